r"""Triton kernels of the radial network: a tile of edges goes through all three layers in registers.

Value: :func:`radial_forward`. Derivative with respect to the distance, for frozen weights: :func:`radial_backward`,
which computes everything again, so nothing is kept between the two. In float32 the first layer, a function of the
distance alone, comes from a table that is made from the weights of the moment (:func:`first_layer_table`). Weight
gradients are matrix products over the edges and stay with PyTorch (``radial.py``).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.backend import interpreting
from e2former_kernels.common.radial import LAYER_NORM_EPS, RadialWeights
from e2former_kernels.common.tiles import next_power


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
    d, zt, zs, in_e, basis, target_table, source_table, at, inside, G, H, NB, spacing,
    HP: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """W0 phi(d) + T[z_i] + S[z_j] for a tile of edges. ``at``: columns of this group in a [G, H] row.

    TABLE: ``basis`` is the table of W0 phi, NB its number of intervals, ``spacing`` how many of them make a length of 1.
    """
    if TABLE:
        x = _cubic(d, basis, at, inside, G, H, NB, spacing, False)
    else:
        x = tl.zeros([BE, HP], dtype=d.dtype)
        for k0 in range(0, NB, BK):
            k = k0 + tl.arange(0, BK)
            t = (d[:, None] - k.to(d.dtype)[None, :] * spacing) * (0.5 / spacing)
            phi = tl.where(k[None, :] < NB, tl.exp(-0.5 * t * t), 0.0)
            w = tl.load(basis + at[:, None] * NB + k[None, :], mask=inside[:, None] & (k[None, :] < NB), other=0.0)
            x = tl.dot(phi, tl.trans(w), acc=x, input_precision=PRECISION, out_dtype=d.dtype)
    both = in_e[:, None] & inside[None, :]
    x += tl.load(target_table + zt[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    x += tl.load(source_table + zs[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    return x


@triton.jit
def radial_forward_kernel(
    distance, target_species, source_species, basis, target_table, source_table, gamma0, beta0, hidden, hidden_bias,
    gamma1, beta1, out_weight, out_bias, out, E, G, H, NB, K, spacing,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out[e, g, :] = network g of edge e ([K] numbers), or with LAST false its last hidden layer ([H] numbers)."""
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
        d, zt, zs, in_e, basis, target_table, source_table, at, inside, G, H, NB, spacing, HP, BE, BK, PRECISION, TABLE
    )
    if NORM:
        _, _, x = _layer_norm(x, gamma0, beta0, at, inside, H, EPS)
    x = x * (1.0 / (1.0 + tl.exp(-x)))
    w = tl.load(hidden + at[:, None] * H + c[None, :], mask=inside[:, None] & inside[None, :], other=0.0)
    x = tl.dot(x, tl.trans(w), input_precision=PRECISION, out_dtype=d.dtype)
    x += tl.load(hidden_bias + at, mask=inside, other=0.0)[None, :]
    if NORM:
        _, _, x = _layer_norm(x, gamma1, beta1, at, inside, H, EPS)
    x = x * (1.0 / (1.0 + tl.exp(-x)))
    if LAST:
        for n0 in range(0, K, BN):
            n = n0 + tl.arange(0, BN)
            in_n = n < K
            v = tl.load(
                out_weight + (g * K + n)[:, None] * H + c[None, :], mask=in_n[:, None] & inside[None, :], other=0.0
            )
            y = tl.dot(x, tl.trans(v), input_precision=PRECISION, out_dtype=d.dtype)
            y += tl.load(out_bias + g * K + n, mask=in_n, other=0.0)[None, :]
            tl.store(out + e[:, None] * (G * K) + (g * K + n)[None, :], y, mask=in_e[:, None] & in_n[None, :])
    else:
        tl.store(out + e[:, None] * (G * H) + at[None, :], x, mask=in_e[:, None] & inside[None, :])


@triton.jit
def radial_backward_kernel(
    distance, target_species, source_species, basis, target_table, source_table, gamma0, beta0, hidden, hidden_t,
    hidden_bias, gamma1, beta1, out_weight_t, grad, grad_distance, E, G, H, NB, K, spacing,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """grad_distance[g, e] = d/dd of sum(grad * network g). hidden_t [G, H, H], out_weight_t [G, H, K]: transposed."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    in_e = e < E
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    square = inside[:, None] & inside[None, :]
    d = tl.load(distance + e, mask=in_e, other=0.0)
    zt = tl.load(target_species + e, mask=in_e, other=0)
    zs = tl.load(source_species + e, mask=in_e, other=0)
    x = _first_layer(
        d, zt, zs, in_e, basis, target_table, source_table, at, inside, G, H, NB, spacing, HP, BE, BK, PRECISION, TABLE
    )
    if NORM:
        normal0, rstd0, x = _layer_norm(x, gamma0, beta0, at, inside, H, EPS)
    gate = 1.0 / (1.0 + tl.exp(-x))
    slope0 = gate * (1.0 + x * (1.0 - gate))
    w = tl.load(hidden + at[:, None] * H + c[None, :], mask=square, other=0.0)
    y = tl.dot(x * gate, tl.trans(w), input_precision=PRECISION, out_dtype=d.dtype)
    y += tl.load(hidden_bias + at, mask=inside, other=0.0)[None, :]
    if NORM:
        normal1, rstd1, y = _layer_norm(y, gamma1, beta1, at, inside, H, EPS)
    gate = 1.0 / (1.0 + tl.exp(-y))
    slope1 = gate * (1.0 + y * (1.0 - gate))
    if LAST:
        q = tl.zeros([BE, HP], dtype=d.dtype)
        for n0 in range(0, K, BN):
            n = n0 + tl.arange(0, BN)
            in_n = n < K
            p = tl.load(
                grad + e[:, None] * (G * K) + (g * K + n)[None, :], mask=in_e[:, None] & in_n[None, :], other=0.0
            )
            v = tl.load(out_weight_t + at[:, None] * K + n[None, :], mask=inside[:, None] & in_n[None, :], other=0.0)
            q = tl.dot(p, tl.trans(v), acc=q, input_precision=PRECISION, out_dtype=d.dtype)
    else:
        q = tl.load(grad + e[:, None] * (G * H) + at[None, :], mask=in_e[:, None] & inside[None, :], other=0.0)
    q = q * slope1
    if NORM:
        q = _layer_norm_backward(q, normal1, rstd1, gamma1, at, inside, H)
    w = tl.load(hidden_t + at[:, None] * H + c[None, :], mask=square, other=0.0)
    q = tl.dot(q, tl.trans(w), input_precision=PRECISION, out_dtype=d.dtype) * slope0
    if NORM:
        q = _layer_norm_backward(q, normal0, rstd0, gamma0, at, inside, H)
    if TABLE:
        slope = _cubic(d, basis, at, inside, G, H, NB, spacing, True)
    else:
        slope = tl.zeros([BE, HP], dtype=d.dtype)
        for k0 in range(0, NB, BK):
            k = k0 + tl.arange(0, BK)
            t = (d[:, None] - k.to(d.dtype)[None, :] * spacing) * (0.5 / spacing)
            phi = tl.where(k[None, :] < NB, tl.exp(-0.5 * t * t) * t * (-0.5 / spacing), 0.0)
            b = tl.load(basis + at[:, None] * NB + k[None, :], mask=inside[:, None] & (k[None, :] < NB), other=0.0)
            slope = tl.dot(phi, tl.trans(b), acc=slope, input_precision=PRECISION, out_dtype=d.dtype)
    total = tl.sum(q * slope, axis=1)
    tl.store(grad_distance + g * E + e, total, mask=in_e)


def dot_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: TF32 where PyTorch may (``torch.set_float32_matmul_precision``), else full float32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# Tile shapes of the two kernels for hidden widths up to 128: edges, outputs at a time, warps (benchmarks/NOTES.md).
TILES = {"forward": (64, 64, 8), "backward": (64, 64, 8)}
# Knots of the table of W0 phi(d) for one distance of two Gaussian centres. Cubic Hermite interpolation of Gaussians of
# width two such distances is then good to 8e-9 of their weights, its slope to 8e-7 (errors h^4/384 and h^3 sqrt(3)/216
# times the fourth derivative).
KNOTS_PER_CENTRE = 16


@functools.lru_cache(maxsize=8)
def _basis_pieces(num_basis: int, device: torch.device) -> Tensor:
    """Coefficients of the piecewise cubics of all Gaussians, [intervals * 4, num_basis], float64."""
    with torch.inference_mode(False):
        knot = torch.arange((num_basis - 1) * KNOTS_PER_CENTRE + 1, dtype=torch.float64, device=device)
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


def _constants(weights: RadialWeights, edges: int, last: bool, dtype: torch.dtype, which: str) -> dict:
    groups, hidden, _ = weights.hidden.shape
    padded = max(next_power(hidden), 16)
    outputs = weights.out.shape[1]
    tile_edges, tile_outputs, warps = (16, 16, 4) if interpreting() else TILES[which]
    if padded > 128:
        tile_edges, tile_outputs = 32, 32
    return {
        "E": edges, "G": groups, "H": hidden, "K": outputs, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": tile_edges,
        "BK": 16 if interpreting() else 32, "BN": min(max(next_power(outputs), 16), tile_outputs),
        "NORM": weights.norm0_weight is not None, "LAST": last, "PRECISION": dot_precision(dtype),
        "num_warps": warps if padded >= 128 else 4, "num_stages": 2,
    }  # fmt: skip


def _first(weights: RadialWeights, cutoff: float) -> tuple[Tensor, dict]:
    """First layer's argument of the kernels: the weights in float64, else their table; and what goes with it."""
    num_basis = weights.basis.shape[-1]
    if weights.basis.dtype == torch.float64:
        return weights.basis.contiguous(), {"NB": num_basis, "spacing": cutoff / (num_basis - 1), "TABLE": False}
    table = first_layer_table(weights.basis)
    scale = (num_basis - 1) * KNOTS_PER_CENTRE / cutoff
    return table, {"NB": table.shape[0], "spacing": scale, "TABLE": True}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def radial_forward(
    distance: Tensor,
    cutoff: float,
    target_species: Tensor,
    source_species: Tensor,
    weights: RadialWeights,
    last: bool = True,
) -> Tensor:
    """Value of :func:`e2former_kernels.common.radial.radial_network` on the Gaussian basis of ``distance``.

    distance: [E], Å; target_species, source_species: [E]. Returns [E, G, K], or with ``last=False`` the last hidden
    layer after its activation, [E, G, h]. No gradient.
    """
    groups, hidden, _ = weights.basis.shape
    edges = distance.numel()
    out = distance.new_empty(edges, groups, weights.out.shape[1] if last else hidden)
    if not edges:
        return out
    w = RadialWeights(weights.basis, *_contiguous(*weights[1:]))
    basis, first = _first(weights, cutoff)
    constants = first | _constants(weights, edges, last, distance.dtype, "forward")
    norm = [basis if t is None else t for t in (w.norm0_weight, w.norm0_bias, w.norm1_weight, w.norm1_bias)]
    radial_forward_kernel[triton.cdiv(edges, constants["BE"]), groups](
        distance, target_species, source_species, basis, w.target_table, w.source_table, norm[0], norm[1],
        w.hidden, w.hidden_bias, norm[2], norm[3], w.out, w.out_bias, out,
        **constants,
    )  # fmt: skip
    return out


def radial_backward(
    grad: Tensor,
    distance: Tensor,
    cutoff: float,
    target_species: Tensor,
    source_species: Tensor,
    weights: RadialWeights,
    last: bool = True,
) -> Tensor:
    """Gradient of ``sum(grad * radial_forward(...))`` with respect to the distance. Returns [E]."""
    groups, edges = weights.basis.shape[0], distance.numel()
    out = distance.new_empty(groups, edges)
    if not edges:
        return out.sum(0)
    w = RadialWeights(weights.basis, *_contiguous(*weights[1:]))
    basis, first = _first(weights, cutoff)
    constants = first | _constants(weights, edges, last, distance.dtype, "backward")
    norm = [basis if t is None else t for t in (w.norm0_weight, w.norm0_bias, w.norm1_weight, w.norm1_bias)]
    radial_backward_kernel[triton.cdiv(edges, constants["BE"]), groups](
        distance, target_species, source_species, basis, w.target_table, w.source_table, norm[0], norm[1],
        w.hidden, w.hidden.transpose(1, 2).contiguous(), w.hidden_bias, norm[2], norm[3],
        w.out.transpose(1, 2).contiguous(), grad.contiguous(), out,
        **constants,
    )  # fmt: skip
    return out[0] if groups == 1 else out.sum(0)
