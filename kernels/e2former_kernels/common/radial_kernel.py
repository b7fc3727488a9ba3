r"""The radial network without a graph: matrix products, with Triton kernels for everything between them.

Value: :func:`radial_forward`. Derivative with respect to the distance, for frozen weights: :func:`radial_backward`.
Callers pass edges in runs of bounded length. In float32 the first layer, a function of the distance alone, comes from
a table that is made from the weights of the moment (:func:`first_layer_table`). Weight gradients stay with PyTorch
(``radial.py``).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.radial import LAYER_NORM_EPS, RadialWeights
from e2former_kernels.common.tiles import ceil_div, next_power

# Intervals of the table of W0 phi(d) for one distance of two Gaussian centres. Cubic Hermite interpolation of Gaussians
# of width two such distances is then good to 8e-9 of their weights, its slope to 8e-7 (errors h^4/384 and
# h^3 sqrt(3)/216 times the fourth derivative).
KNOTS_PER_CENTRE = 16
# The table reaches this many centre distances beyond the last Gaussian, which is 1e-14 there: exact at any distance.
CENTRES_BEYOND = 16


@triton.jit
def _layer_norm(x, weight, bias, at, inside, H, EPS: tl.constexpr):
    """(normalised, 1/std, affine result) of the rows of x, whose columns beyond H are zero."""
    mean = tl.sum(x, axis=1) / H
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / H + EPS)
    normal = centred * rstd[:, None]
    gamma = tl.load(weight + at, mask=inside, other=0.0)
    beta = tl.load(bias + at, mask=inside, other=0.0)
    return normal, rstd, normal * gamma[None, :] + beta[None, :]


@triton.jit
def _layer_norm_backward(grad, normal, rstd, weight, at, inside, H):
    gamma = tl.load(weight + at, mask=inside, other=0.0)
    g = grad * gamma[None, :]
    mean = tl.sum(g, axis=1) / H
    slope = tl.sum(g * normal, axis=1) / H
    return tl.where(inside[None, :], (g - mean[:, None] - normal * slope[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _cubic(d, table, at, inside, G, H, intervals, scale, SLOPE: tl.constexpr):
    """Piecewise cubic W0 phi(d), or its derivative by d.

    table: [intervals, 4, G, H], coefficients in the position within the interval, 0 to 1. Constant beyond the last.
    """
    t = tl.minimum(d * scale, intervals.to(d.dtype))
    k = tl.minimum(t.to(tl.int32), intervals - 1)
    f = (t - k.to(d.dtype))[:, None]
    row = G * H
    base = table + (k * 4 * row)[:, None] + at[None, :]
    inside = inside[None, :]
    if SLOPE:
        x = 3.0 * f * tl.load(base + 3 * row, mask=inside, other=0.0)
        x = f * (x + 2.0 * tl.load(base + 2 * row, mask=inside, other=0.0))
        x = (x + tl.load(base + row, mask=inside, other=0.0)) * scale
        x = tl.where((d * scale <= intervals.to(d.dtype))[:, None], x, 0.0)
    else:
        x = f * tl.load(base + 3 * row, mask=inside, other=0.0)
        x = f * (x + tl.load(base + 2 * row, mask=inside, other=0.0))
        x = f * (x + tl.load(base + row, mask=inside, other=0.0))
        x += tl.load(base, mask=inside, other=0.0)
    return x


@triton.jit
def _first_layer(
    d, e, in_e, zt, zs, table, target_table, source_table, at, inside, E, G, H, intervals, scale, g,
    TABLE: tl.constexpr,
):  # fmt: skip
    """W0 phi(d) + T[z_i] + S[z_j] of a tile of edges. TABLE false: ``table`` holds W0 phi(d) itself, [G, E, H]."""
    both = in_e[:, None] & inside[None, :]
    if TABLE:
        x = _cubic(d, table, at, inside, G, H, intervals, scale, False)
    else:
        x = tl.load(table + (g * E + e)[:, None] * H + (at - g * H)[None, :], mask=both, other=0.0)
    x += tl.load(target_table + zt[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    x += tl.load(source_table + zs[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    return x


@triton.jit
def first_kernel(
    distance, target_species, source_species, table, target_table, source_table, gamma, beta, out,
    E, G, H, intervals, scale,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out[g, e] = SiLU(LN(W0 [phi(d); T; S] + b0)), [G, E, H]."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    in_e = e < E
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    d = tl.load(distance + e, mask=in_e, other=0.0)
    zt = tl.load(target_species + e, mask=in_e, other=0)
    zs = tl.load(source_species + e, mask=in_e, other=0)
    x = _first_layer(
        d, e, in_e, zt, zs, table, target_table, source_table, at, inside, E, G, H, intervals, scale, g, TABLE
    )
    if NORM:
        _, _, x = _layer_norm(x, gamma, beta, at, inside, H, EPS)
    x = x * (1.0 / (1.0 + tl.exp(-x)))
    tl.store(out + (g * E + e)[:, None] * H + c[None, :], x, mask=in_e[:, None] & inside[None, :])


@triton.jit
def first_backward_kernel(
    grad, distance, target_species, source_species, table, slopes, target_table, source_table, gamma, beta, out,
    E, G, H, intervals, scale,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out[g, e] = d/dd of <grad, first_kernel>."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    in_e = e < E
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    both = in_e[:, None] & inside[None, :]
    row = (g * E + e)[:, None] * H + c[None, :]
    d = tl.load(distance + e, mask=in_e, other=0.0)
    zt = tl.load(target_species + e, mask=in_e, other=0)
    zs = tl.load(source_species + e, mask=in_e, other=0)
    x = _first_layer(
        d, e, in_e, zt, zs, table, target_table, source_table, at, inside, E, G, H, intervals, scale, g, TABLE
    )
    if NORM:
        normal, rstd, x = _layer_norm(x, gamma, beta, at, inside, H, EPS)
    gate = 1.0 / (1.0 + tl.exp(-x))
    q = tl.load(grad + row, mask=both, other=0.0) * gate * (1.0 + x * (1.0 - gate))
    if NORM:
        q = _layer_norm_backward(q, normal, rstd, gamma, at, inside, H)
    if TABLE:
        slope = _cubic(d, table, at, inside, G, H, intervals, scale, True)
    else:
        slope = tl.load(slopes + row, mask=both, other=0.0)
    tl.store(out + g * E + e, tl.sum(q * slope, axis=1), mask=in_e)


@triton.jit
def second_kernel(
    x, bias, gamma, beta, out, E, G, H,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, EDGE_MAJOR: tl.constexpr,
):  # fmt: skip
    """out = SiLU(LN(x + b1)). x: [G, E, H]; out: [G, E, H], or [E, G, H] with EDGE_MAJOR."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    both = (e < E)[:, None] & inside[None, :]
    y = tl.load(x + (g * E + e)[:, None] * H + c[None, :], mask=both, other=0.0)
    y += tl.load(bias + at, mask=inside, other=0.0)[None, :]
    if NORM:
        _, _, y = _layer_norm(y, gamma, beta, at, inside, H, EPS)
    y = y * (1.0 / (1.0 + tl.exp(-y)))
    if EDGE_MAJOR:
        tl.store(out + e[:, None] * (G * H) + at[None, :], y, mask=both)
    else:
        tl.store(out + (g * E + e)[:, None] * H + c[None, :], y, mask=both)


@triton.jit
def second_backward_kernel(
    grad, x, bias, gamma, beta, out, E, G, H,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, EDGE_MAJOR: tl.constexpr,
):  # fmt: skip
    """Gradient of second_kernel by x, [G, E, H]. grad: as the output of second_kernel."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    both = (e < E)[:, None] & inside[None, :]
    row = (g * E + e)[:, None] * H + c[None, :]
    y = tl.load(x + row, mask=both, other=0.0) + tl.load(bias + at, mask=inside, other=0.0)[None, :]
    if NORM:
        normal, rstd, y = _layer_norm(y, gamma, beta, at, inside, H, EPS)
    gate = 1.0 / (1.0 + tl.exp(-y))
    if EDGE_MAJOR:
        q = tl.load(grad + e[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    else:
        q = tl.load(grad + row, mask=both, other=0.0)
    q = q * gate * (1.0 + y * (1.0 - gate))
    if NORM:
        q = _layer_norm_backward(q, normal, rstd, gamma, at, inside, H)
    tl.store(out + row, q, mask=both)


@functools.lru_cache(maxsize=8)
def _basis_pieces(num_basis: int, device: torch.device) -> Tensor:
    """Coefficients of the piecewise cubics of all Gaussians, [intervals * 4, num_basis], float64."""
    with torch.inference_mode(False):
        knot = torch.arange((num_basis - 1 + CENTRES_BEYOND) * KNOTS_PER_CENTRE + 1, dtype=torch.float64, device=device)
        centre = torch.arange(num_basis, dtype=torch.float64, device=device)
        t = 0.5 * (knot.unsqueeze(1) / KNOTS_PER_CENTRE - centre)
        value = torch.exp(-0.5 * t * t)
        slope = -0.5 / KNOTS_PER_CENTRE * t * value
        rise, left, right = value[1:] - value[:-1], slope[:-1], slope[1:]
        pieces = [value[:-1], left, 3.0 * rise - 2.0 * left - right, left + right - 2.0 * rise]
        return torch.stack(pieces, 1).flatten(0, 1)


def first_layer_table(basis: Tensor) -> Tensor:
    """Piecewise cubic of W0 phi(d) for the kernels, [intervals, 4, G, h]: coefficients in the position in the interval.

    basis: W0, [G, h, n_b]. An interval is the distance of two Gaussian centres over ``KNOTS_PER_CENTRE``.
    """
    groups, hidden, num_basis = basis.shape
    pieces = _basis_pieces(num_basis, basis.device)
    table = pieces @ basis.reshape(groups * hidden, num_basis).to(torch.float64).t()
    return table.to(basis.dtype).view(-1, 4, groups, hidden)


def norm_launch(groups: int, rows: int, width: int, norms: bool) -> tuple[tuple[int, int], dict]:
    """Grid and constants of the kernels on [groups, rows, width]."""
    padded = next_power(width)
    block = max(2048 // padded, 1)
    constants = {
        "E": rows, "G": groups, "H": width, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": block, "NORM": norms,
        "num_warps": 4,
    }  # fmt: skip
    return (ceil_div(rows, block), groups), constants


class RadialNetwork:
    """Radial networks with weights that no gradient is asked for, ready to be evaluated on runs of edges.

    cutoff: Å. last: with the last linear layer (results [E, G, K]) or without it (results [E, G, h]).
    """

    def __init__(self, weights: RadialWeights, cutoff: float, last: bool = True) -> None:
        self.weights = RadialWeights(*(None if t is None else t.detach().contiguous() for t in weights))
        self.cutoff, self.last = cutoff, last
        self.groups, self.hidden, self.num_basis = weights.basis.shape
        self.exact = weights.basis.dtype == torch.float64
        self.table = self.weights.basis if self.exact else first_layer_table(self.weights.basis)

    def _launch(self, edges: int) -> tuple[tuple[int, int], dict]:
        return norm_launch(self.groups, edges, self.hidden, self.weights.norm0_weight is not None)

    def _first(self, distance: Tensor, slope: bool) -> tuple[Tensor, Tensor, dict]:
        """Table, slopes and constants of the first layer's kernels."""
        if not self.exact:
            intervals = self.table.shape[0]
            scale = (self.num_basis - 1) * KNOTS_PER_CENTRE / self.cutoff
            return self.table, self.table, {"intervals": intervals, "scale": scale, "TABLE": True}
        spacing = self.cutoff / (self.num_basis - 1)
        centre = torch.arange(self.num_basis, dtype=distance.dtype, device=distance.device) * spacing
        t = (distance.unsqueeze(-1) - centre) * (0.5 / spacing)
        phi = torch.exp(-0.5 * t * t)
        weight = self.weights.basis.transpose(1, 2)
        value = torch.matmul(phi, weight)
        slopes = torch.matmul(phi * t * (-0.5 / spacing), weight) if slope else value
        return value, slopes, {"intervals": 1, "scale": 1.0, "TABLE": False}

    def _norm(self, which: int) -> tuple[Tensor, Tensor]:
        w = self.weights
        if w.norm0_weight is None:
            return w.basis, w.basis
        return (w.norm0_weight, w.norm0_bias) if which == 0 else (w.norm1_weight, w.norm1_bias)

    def forward(self, distance: Tensor, target_species: Tensor, source_species: Tensor) -> tuple[Tensor, Tensor]:
        """Results, and the second layer's products [G, E, h], which :meth:`backward` takes.

        distance: [E], Å; target_species, source_species: [E].
        """
        w, edges = self.weights, distance.numel()
        out = distance.new_empty(self.groups, edges, self.hidden)
        if not edges:
            width = w.out.shape[1] if self.last else self.hidden
            return distance.new_empty(0, self.groups, width), out
        grid, constants = self._launch(edges)
        table, _, first = self._first(distance, False)
        first_kernel[grid](
            distance, target_species, source_species, table, w.target_table, w.source_table, *self._norm(0), out,
            **first, **constants,
        )  # fmt: skip
        middle = torch.bmm(out, w.hidden.transpose(1, 2))
        if not self.last:
            out = out.view(edges, self.groups, self.hidden)
        second_kernel[grid](middle, w.hidden_bias, *self._norm(1), out, EDGE_MAJOR=not self.last, **constants)
        if not self.last:
            return out, middle
        if self.groups == 1:
            return torch.addmm(w.out_bias[0], out[0], w.out[0].t()).unsqueeze(1), middle
        return torch.baddbmm(w.out_bias.unsqueeze(1), out, w.out.transpose(1, 2)).transpose(0, 1).contiguous(), middle

    def backward(
        self, grad: Tensor, middle: Tensor, distance: Tensor, target_species: Tensor, source_species: Tensor
    ) -> Tensor:
        """Gradient of ``sum(grad * forward(...))`` by the distance, [E]. ``middle`` is used up."""
        w, edges = self.weights, distance.numel()
        if not edges:
            return distance.new_empty(0)
        grid, constants = self._launch(edges)
        if self.last:
            if self.groups == 1:
                grad = torch.mm(grad.reshape(edges, -1), w.out[0]).unsqueeze(0)
            else:
                grad = torch.bmm(grad.transpose(0, 1), w.out)
        second_backward_kernel[grid](
            grad.contiguous(), middle, w.hidden_bias, *self._norm(1), middle, EDGE_MAJOR=not self.last, **constants
        )
        grad = torch.bmm(middle, w.hidden)
        table, slopes, first = self._first(distance, True)
        out = distance.new_empty(self.groups, edges)
        first_backward_kernel[grid](
            grad, distance, target_species, source_species, table, slopes, w.target_table, w.source_table,
            *self._norm(0), out, **first, **constants,
        )  # fmt: skip
        return out[0] if self.groups == 1 else out.sum(0)
