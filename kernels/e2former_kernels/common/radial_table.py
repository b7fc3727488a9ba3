r"""Radial networks with frozen weights as splines: a table over the distance for every ordered pair of elements.

For two elements the network :math:`f_{z_i z_j}(d)` (``radial.py``) is a smooth function of the distance alone. Knots a
fixed step h apart hold its value and slope, computed in float64; between two knots stands the cubic that fits both
(Hermite), so the interpolant has a continuous derivative, and kernels take value and derivative from the same numbers.
The step is halved until the interpolant meets the network between the knots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.radial import LAYER_NORM_EPS, RadialWeights, gaussian_basis

#: Largest error of a table, relative to the largest value in it.
TOLERANCE = 1e-6
#: Knots for one distance of two Gaussian centres: tried in turn.
KNOTS_PER_CENTRE = (2, 4, 8, 16, 32)
#: Largest table of one network, in bytes.
MAX_BYTES = 256 << 20
# Rows of the network evaluated at once while a table is made.
_ROWS = 1 << 14


class RadialTable(NamedTuple):
    """Splines of a radial network with one group.

    knots: [pairs * (intervals + 1), 2, K], value and slope times the step. pair_row: [Z, Z] int32, first row of the
    ordered pair (receiver's element, sender's element), -1 for pairs that are not in the table. intervals: of each
    pair. scale: intervals per Å. error: largest error found between the knots, relative to the largest value.
    """

    knots: Tensor
    pair_row: Tensor
    intervals: int
    scale: float
    error: float


def _network(distance: Tensor, rows: Tensor, weights: RadialWeights, cutoff: float) -> Tensor:
    """The network of one group; rows [n, h] are T[z_i] + S[z_j] of its first layer. distance: [n]. Returns [n, K]."""

    def activate(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            return F.silu(x)
        centred = x - x.mean(-1, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
        return F.silu(normal * weight[0] + bias[0])

    x = gaussian_basis(distance, cutoff, weights.basis.shape[-1]) @ weights.basis[0].t() + rows
    x = activate(x, weights.norm0_weight, weights.norm0_bias)
    x = activate(x @ weights.hidden[0].t() + weights.hidden_bias[0], weights.norm1_weight, weights.norm1_bias)
    return x @ weights.out[0].t() + weights.out_bias[0]


def _on_grid(distance: Tensor, rows: Tensor, weights: RadialWeights, cutoff: float, slope: bool) -> Tensor:
    """Values [pairs, n, K], or with ``slope`` values and slopes [pairs, n, 2, K], in float64. rows: [pairs, h]."""
    number, out = distance.numel(), []
    for start in range(0, rows.shape[0] * number, _ROWS):
        at = torch.arange(start, min(start + _ROWS, rows.shape[0] * number), device=distance.device)
        pair, d = rows.index_select(0, at // number), distance.index_select(0, at % number)

        def network(x: Tensor, pair: Tensor = pair) -> Tensor:
            return _network(x, pair, weights, cutoff)

        if slope:
            out.append(torch.stack(torch.func.jvp(network, (d,), (torch.ones_like(d),)), 1))
        else:
            out.append(network(d))
    return torch.cat(out).unflatten(0, (rows.shape[0], number))


def hermite(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of value and slope at the left knot and at the right one; f: position in the interval, 0 to 1."""
    right = f * f * (3.0 - 2.0 * f)
    return 1.0 - right, f * (1.0 - f) * (1.0 - f), right, f * f * (f - 1.0)


def table_bytes(elements: int, weights: RadialWeights, knots_per_centre: int = KNOTS_PER_CENTRE[0]) -> int:
    """Bytes of a table for so many elements, in float32."""
    num_basis = weights.basis.shape[-1]
    return elements * elements * ((num_basis - 1) * knots_per_centre + 1) * 2 * weights.out.shape[1] * 4


@torch.no_grad()
def build_radial_table(
    weights: RadialWeights,
    cutoff: float,
    elements: Sequence[int],
    tolerance: float = TOLERANCE,
    max_bytes: int = MAX_BYTES,
) -> RadialTable | None:
    """Splines for all ordered pairs of ``elements`` on [0, cutoff] (Å), in the dtype of the weights.

    weights: of one group. Returns None when the table would exceed ``max_bytes`` or when no step that is tried reaches
    ``tolerance``. Raises ValueError for several groups.
    """
    if weights.basis.shape[0] != 1:
        raise ValueError(f"weights: expected one network, got {weights.basis.shape[0]}")
    exact = RadialWeights(*(None if t is None else t.detach().double() for t in weights))
    dtype, device, number = weights.basis.dtype, weights.basis.device, len(elements)
    index = torch.tensor(sorted(elements), device=device)
    rows = exact.target_table[index].unsqueeze(1) + exact.source_table[index].unsqueeze(0)
    rows = rows.view(number * number, -1)
    for per_centre in KNOTS_PER_CENTRE:
        if table_bytes(number, weights, per_centre) > max_bytes:
            return None
        intervals = (weights.basis.shape[-1] - 1) * per_centre
        step = cutoff / intervals
        at = torch.arange(intervals + 1, dtype=torch.float64, device=device) * step
        knots = _on_grid(at, rows, exact, cutoff, True)
        knots[:, :, 1] *= step
        # the middle of the intervals is where the error of a cubic is largest; a coprime stride visits all regions
        probe = torch.arange(0, intervals, max(intervals // 512, 1), device=device)
        a, b, c, d = hermite(torch.tensor(0.5, dtype=torch.float64, device=device))
        left, right = knots[:, probe], knots[:, probe + 1]
        found = a * left[:, :, 0] + b * left[:, :, 1] + c * right[:, :, 0] + d * right[:, :, 1]
        expected = _on_grid(at[probe] + 0.5 * step, rows, exact, cutoff, False)
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if error <= tolerance:
            size = exact.target_table.shape[0]
            pair_row = torch.full((size, size), -1, dtype=torch.int32, device=device)
            first = torch.arange(number * number, dtype=torch.int32, device=device) * (intervals + 1)
            pair_row[index.unsqueeze(1), index.unsqueeze(0)] = first.view(number, number)
            return RadialTable(
                knots.flatten(0, 1).to(dtype).contiguous(), pair_row, intervals, intervals / cutoff, error
            )
    return None
