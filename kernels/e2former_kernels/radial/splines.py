"""Radial networks with frozen weights as splines: one over the distance for every ordered pair of elements.

docs/network.md, section 13.2.

For two elements the network :math:`f_{z_i z_j}(d)` is a smooth function of the distance alone. Knots at intervals of
one width h hold its value and slope, computed in float64; between two knots stands the cubic that fits both (Hermite),
so the interpolant has a continuous derivative, and kernels take value and derivative from the same numbers. Intervals
are halved until the interpolant meets the network between the knots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.checks import check_same, check_tensors
from e2former_kernels.common.tiles import tl, triton
from e2former_kernels.radial.reference import RadialWeights, gaussian_basis, hidden_layers, last_layer

#: Largest error of splines, relative to their largest value.
TOLERANCE = 1e-6
#: Knots for one distance of two Gaussian centres: tried in turn.
KNOTS_PER_CENTRE = (2, 4, 8, 16, 32)
#: Largest splines of one network, in bytes.
MAX_BYTES = 256 << 20
# Rows of the network evaluated at once while splines are made.
_ROWS = 1 << 14


class RadialSplines(NamedTuple):
    """Splines of radial networks.

    knots: [pairs * (intervals + 1), 2, K], value and slope times an interval's width; K = groups times results of one.
    pair_row: [Z, Z] int32, first row of the ordered pair (receiver's element, sender's element), -1 for pairs that are
    not there. intervals: of each pair. scale: intervals per Å. error: largest found between the knots, relative
    to the largest value.
    """

    knots: Tensor
    pair_row: Tensor
    intervals: int
    scale: float
    error: float


def _network(distance: Tensor, rows: Tensor, weights: RadialWeights, cutoff: float, last: bool) -> Tensor:
    """The networks [n, K]; rows [G, n, h] are T[z_i] + S[z_j] of their first layer. distance: [n]."""
    basis = gaussian_basis(distance, cutoff, weights.basis.shape[-1])
    x = hidden_layers(torch.matmul(basis, weights.basis.transpose(1, 2)) + rows, weights)
    return (last_layer(x, weights) if last else x).transpose(0, 1).flatten(1)


def _on_grid(distance: Tensor, rows: Tensor, network: Callable[[Tensor, Tensor], Tensor], slope: bool) -> Tensor:
    """Values [pairs, n, K], or with ``slope`` values and slopes [pairs, n, 2, K]. rows: [G, pairs, h]."""
    number, pairs, out = distance.numel(), rows.shape[1], []
    for start in range(0, pairs * number, _ROWS):
        at = torch.arange(start, min(start + _ROWS, pairs * number), device=distance.device)
        pair, d = rows.index_select(1, at // number), distance.index_select(0, at % number)
        if slope:
            out.append(torch.stack(torch.func.jvp(lambda x, p=pair: network(x, p), (d,), (torch.ones_like(d),)), 1))
        else:
            out.append(network(d, pair))
    return torch.cat(out).unflatten(0, (pairs, number))


def hermite(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of value and slope at the left knot and at the right one; f: position in the interval, 0 to 1."""
    right = f * f * (3.0 - 2.0 * f)
    return 1.0 - right, f * (1.0 - f) * (1.0 - f), right, f * f * (f - 1.0)


@torch.no_grad()
def build_splines(
    weights: RadialWeights,
    cutoff: float,
    elements: Sequence[int],
    last: bool = True,
    tolerance: float = TOLERANCE,
    max_bytes: int = MAX_BYTES,
) -> RadialSplines | None:
    """Splines for all ordered pairs of ``elements``, in the dtype of the weights (docs/network.md, equation 13.2).

    Args:
        weights: of G networks, whose results stand side by side.
        cutoff: where they end, Å.
        elements: atomic numbers.
        last: with the networks' last linear layer, or without it.
        tolerance: largest error between the knots, relative to the largest value.
        max_bytes: largest splines, in float32.

    Returns:
        The splines; None where they would exceed ``max_bytes`` or where no width that is tried reaches ``tolerance``.
    """
    exact = RadialWeights(*(None if t is None else t.detach().double() for t in weights))
    dtype, device, pairs = weights.basis.dtype, weights.basis.device, len(elements) ** 2
    results = weights.out.shape[0] * weights.out.shape[1 if last else 2]
    index = torch.tensor(sorted(elements), device=device)
    rows = exact.target_embedding[index].unsqueeze(1) + exact.source_embedding[index].unsqueeze(0)
    rows = rows.flatten(0, 1).transpose(0, 1)

    def network(distance: Tensor, rows: Tensor) -> Tensor:
        return _network(distance, rows, exact, cutoff, last)

    for per_centre in KNOTS_PER_CENTRE:
        intervals = (weights.basis.shape[-1] - 1) * per_centre
        if pairs * (intervals + 1) * 2 * results * 4 > max_bytes:
            return None
        width = cutoff / intervals
        at = torch.arange(intervals + 1, dtype=torch.float64, device=device) * width
        knots = _on_grid(at, rows, network, True)
        knots[:, :, 1] *= width
        # the error of a cubic is largest in the middle of its interval
        probe = torch.arange(0, intervals, max(intervals // 512, 1), device=device)
        a, b, c, d = hermite(torch.tensor(0.5, dtype=torch.float64, device=device))
        left, right = knots[:, probe], knots[:, probe + 1]
        found = a * left[:, :, 0] + b * left[:, :, 1] + c * right[:, :, 0] + d * right[:, :, 1]
        expected = _on_grid(at[probe] + 0.5 * width, rows, network, False)
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if error <= tolerance:
            size = exact.target_embedding.shape[0]
            pair_row = torch.full((size, size), -1, dtype=torch.int32, device=device)
            first = torch.arange(pairs, dtype=torch.int32, device=device) * (intervals + 1)
            pair_row[index.unsqueeze(1), index.unsqueeze(0)] = first.view(len(elements), len(elements))
            knots = knots.flatten(0, 1).to(dtype).contiguous()
            return RadialSplines(knots, pair_row, intervals, intervals / cutoff, error)
    return None


def check_splines(splines: RadialSplines, like: Tensor, results: int, trained: bool) -> None:
    """Raise ValueError or TypeError where splines do not belong to a call.

    like: a tensor of the call's dtype and device; results: K; trained: the networks' weights are.
    """
    shape = splines.knots, "pairs (intervals + 1), 2, K", (splines.knots.shape[0], 2, results)
    check_tensors("the input", like, **{"splines.knots": shape})
    check_same("the input", like, False, **{"splines.pair_row": splines.pair_row})
    for name in ("knots", "pair_row"):
        tensor = getattr(splines, name)
        if not tensor.is_contiguous():
            raise ValueError(f"splines.{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if trained:
        raise ValueError("splines: expected None where the radial network's weights are trained")


@triton.jit
def load(at, mask, MASKED: tl.constexpr):
    """What lies at ``at``; with MASKED zero where the mask is false."""
    if MASKED:
        x = tl.load(at, mask=mask, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def ends(features, row, c, K: tl.constexpr, mask, MASKED: tl.constexpr):
    """Value and slope at both ends of an interval, columns c."""
    at = features + row * (2 * K) + c
    v0, s0 = load(at, mask, MASKED), load(at + K, mask, MASKED)
    return v0, s0, load(at + 2 * K, mask, MASKED), load(at + 3 * K, mask, MASKED)


@triton.jit
def cubic(v0, s0, v1, s1, f):
    """The spline at position f of an interval with these :func:`ends`."""
    right = f * f * (3.0 - 2.0 * f)
    return v0 + right * (v1 - v0) + f * (1.0 - f) * ((1.0 - f) * s0 - f * s1)


@triton.jit
def feature(features, row, position, e, c, mask, K: tl.constexpr, SPLINE: tl.constexpr, MASKED: tl.constexpr):
    """Columns c of the features of edge e."""
    if SPLINE:
        v0, s0, v1, s1 = ends(features, tl.load(row + e).to(tl.int64), c, K, mask, MASKED)
        x = cubic(v0, s0, v1, s1, tl.load(position + e))
    else:
        x = load(features + e * K + c, mask, MASKED)
    return x


@triton.jit
def spline_and_slope(features, row, f, c, mask, knots_per_length, K: tl.constexpr, MASKED: tl.constexpr):
    """Columns c of the spline in the interval ``row``, at position f of it, and their derivative by the length."""
    v0, s0, v1, s1 = ends(features, row, c, K, mask, MASKED)
    slope = 6.0 * f * (1.0 - f) * (v1 - v0) + (1.0 - f) * (1.0 - 3.0 * f) * s0 + f * (3.0 * f - 2.0) * s1
    return cubic(v0, s0, v1, s1, f), slope * knots_per_length


@triton.jit
def place(d, zi, zj, pair_row, inside, Z, intervals, knots_per_length):
    """First row of the interval in which edges of length d between elements zi and zj lie, and the position in it."""
    t = tl.minimum(d * knots_per_length, intervals.to(d.dtype))
    k = tl.minimum(t.to(tl.int32), intervals - 1)
    return tl.load(pair_row + zi * Z + zj, mask=inside, other=0) + k, t - k.to(d.dtype)
