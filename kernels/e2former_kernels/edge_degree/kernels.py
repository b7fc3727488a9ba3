r"""Weighted harmonics of edges, sums over a receiver's edges of them times radial features, and their derivatives.

Harmonics have kernels, as autograd of :func:`solid_harmonics` would keep some hundred numbers of every edge.

:math:`F = \sum_e \sum_{m,c} Y_{em} a_{e l(m) c} g_{i(e) m c}` is linear in the harmonics Y [E, M], the radial features
a [E, L, K] and g [N, M, K]; the kernels are its three partial derivatives. Receivers own their edges (row_ptr: [N+1]):
no scatter. Tensors are contiguous. With frozen weights a is read from splines (``radial/splines.py``) where it is used.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.chunks import EdgeChunk
from e2former_kernels.common.envelope import envelope_bend, envelope_of
from e2former_kernels.common.harmonics import (
    add_slopes,
    degree_of,
    harmonic_scales,
    next_order,
    next_order_dot,
    next_order_slopes,
    next_order_slopes_dot,
    store_vector,
    vector_dot,
    vector_of,
)
from e2former_kernels.common.tiles import next_power
from e2former_kernels.edge_degree.reference import AVERAGE_DEGREE, PAD, EmbeddingSpec
from e2former_kernels.radial.splines import RadialSplines, feature, place, spline_and_slope


def _edge_constants(spec: EmbeddingSpec) -> dict:
    return spec.envelope.arguments | {"L": spec.lmax, "BLOCK": 128}


def _grid_and_scales(vec: Tensor, spec: EmbeddingSpec) -> tuple[tuple[int], Tensor]:
    return (math.ceil(vec.shape[0] / 128),), harmonic_scales(spec.lmax, AVERAGE_DEGREE, vec.dtype, vec.device)


@triton.jit
def harmonics_kernel(
    vec, scales, distance, out, E, lower, upper, L: tl.constexpr, ENVELOPE: tl.constexpr, BLOCK: tl.constexpr
):
    """distance [E] and out [E, (L+1)^2]. scales: [L+1, L+1], the factor of each degree and order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, True)
    tl.store(distance + e, d, mask=inside)
    u, _ = envelope_of(d, lower, upper, ENVELOPE)
    to = out + e * ((L + 1) * (L + 1))
    c = 0.0 * x + 1.0
    s = 0.0 * x
    top = 0.0 * x + 1.0
    for m in tl.static_range(L + 1):
        before = 0.0 * x
        p = top
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * before) / (l - m)
                before = p
                p = after
            factor = u * p * tl.load(scales + l * (L + 1) + m)
            tl.store(to + l * l + l + m, factor * c, mask=inside)
            if m > 0:
                tl.store(to + l * l + l - m, factor * s, mask=inside)
        top = top * (2 * m + 1)
        c, s = next_order(c, s, x, z)


@triton.jit
def harmonics_backward_kernel(
    grad, grad_distance, vec, scales, out, E, lower, upper, L: tl.constexpr, ENVELOPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient by vec from those by out [E, (L+1)^2] and by distance [E] of harmonics_kernel."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, True)
    u, du = envelope_of(d, lower, upper, ENVELOPE)
    at = grad + e * ((L + 1) * (L + 1))
    c = 0.0 * x + 1.0
    s = 0.0 * x
    # derivatives of c and s by x and z; p depends on y alone
    cx, cz, sx, sz = s, s, s, s
    gx, gy, gz, total = s, s, s, s
    top = c
    for m in tl.static_range(L + 1):
        before, p, slope_before, slope = 0.0 * x, top, 0.0 * x, 0.0 * x
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * before) / (l - m)
                slope_after = ((2 * l - 1) * (p + y * slope) - (l + m - 1) * slope_before) / (l - m)
                before, p, slope_before, slope = p, after, slope, slope_after
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * tl.load(at + l * l + l + m, mask=inside, other=0.0)
            gx, gy, gz, total = add_slopes(gx, gy, gz, total, g, p, slope, p, c, cx, cz)
            if m > 0:
                g = scale * tl.load(at + l * l + l - m, mask=inside, other=0.0)
                gx, gy, gz, total = add_slopes(gx, gy, gz, total, g, p, slope, p, s, sx, sz)
        top = top * (2 * m + 1)
        cx, cz, sx, sz = next_order_slopes(c, s, cx, cz, sx, sz, x, z)
        c, s = next_order(c, s, x, z)
    along = gx * x + gy * y + gz * z
    radial = du * total + tl.load(grad_distance + e, mask=inside, other=0.0)
    vx, vy = u * (gx - along * x) / d + radial * x, u * (gy - along * y) / d + radial * y
    store_vector(out, e, inside, vx, vy, u * (gz - along * z) / d + radial * z)


def weighted_harmonics(vec: Tensor, spec: EmbeddingSpec) -> tuple[Tensor, Tensor]:
    """Lengths [E] and u(d) Y / mean degree [E, (lmax+1)^2] of vec [E, 3], contiguous. No gradient."""
    edges = vec.shape[0]
    distance, out = vec.new_empty(edges), vec.new_empty(edges, (spec.lmax + 1) ** 2)
    if edges:
        grid, scales = _grid_and_scales(vec, spec)
        harmonics_kernel[grid](vec, scales, distance, out, edges, **_edge_constants(spec))
    return distance, out


def weighted_harmonics_backward(
    grad: Tensor, grad_distance: Tensor, vec: Tensor, spec: EmbeddingSpec, out: Tensor
) -> None:
    """Gradient of :func:`weighted_harmonics` by vec, to out [E, 3]."""
    if vec.shape[0]:
        grid, scales = _grid_and_scales(vec, spec)
        harmonics_backward_kernel[grid](
            grad.contiguous(), grad_distance.contiguous(), vec, scales, out, vec.shape[0], **_edge_constants(spec)
        )


@triton.jit
def harmonics_tangent_kernel(
    vec, vec_dot, scales, distance, distance_dot, out, out_dot, E, lower, upper,
    L: tl.constexpr, ENVELOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """distance [E] and out [E, (L+1)^2], as harmonics_kernel, and their changes along vec_dot."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, True)
    x_dot, y_dot, z_dot, d_dot = vector_dot(vec_dot, e, inside, x, y, z, d, True)
    tl.store(distance + e, d, mask=inside)
    tl.store(distance_dot + e, d_dot, mask=inside)
    u, du = envelope_of(d, lower, upper, ENVELOPE)
    u_dot = du * d_dot
    at = e * ((L + 1) * (L + 1))
    c = 0.0 * x + 1.0
    s = 0.0 * x
    c_dot, s_dot = s, s
    top = c
    for m in tl.static_range(L + 1):
        before = 0.0 * x
        before_dot, p, p_dot = before, top, before
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * before) / (l - m)
                after_dot = ((2 * l - 1) * (y_dot * p + y * p_dot) - (l + m - 1) * before_dot) / (l - m)
                before, before_dot, p, p_dot = p, p_dot, after, after_dot
            scale = tl.load(scales + l * (L + 1) + m)
            factor = scale * u * p
            factor_dot = scale * (u_dot * p + u * p_dot)
            tl.store(out + at + l * l + l + m, factor * c, mask=inside)
            tl.store(out_dot + at + l * l + l + m, factor_dot * c + factor * c_dot, mask=inside)
            if m > 0:
                tl.store(out + at + l * l + l - m, factor * s, mask=inside)
                tl.store(out_dot + at + l * l + l - m, factor_dot * s + factor * s_dot, mask=inside)
        top = top * (2 * m + 1)
        c_dot, s_dot = next_order_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot)
        c, s = next_order(c, s, x, z)


@triton.jit
def harmonics_second_kernel(
    grad, grad_dot, grad_distance, grad_distance_dot, vec, vec_dot, scales, out, E, lower, upper,
    L: tl.constexpr, ENVELOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by vec from those by everything that harmonics_tangent_kernel returns.

    Long: values, slopes and their changes go through one loop over the orders.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, True)
    x_dot, y_dot, z_dot, d_dot = vector_dot(vec_dot, e, inside, x, y, z, d, True)
    u, du = envelope_of(d, lower, upper, ENVELOPE)
    at = e * ((L + 1) * (L + 1))
    zero = 0.0 * x
    c = zero + 1.0
    s = zero
    c_dot, s_dot = zero, zero
    # derivatives of c and s by x and z; p depends on y alone
    cx, cz, sx, sz = zero, zero, zero, zero
    cx_dot, cz_dot, sx_dot, sz_dot = zero, zero, zero, zero
    # t = <grad, Y> and its gradient; the same for grad_dot, with changes
    gx, gy, gz, total = zero, zero, zero, zero
    hx, hy, hz, other = zero, zero, zero, zero
    hx_dot, hy_dot, hz_dot, other_dot = zero, zero, zero, zero
    top = c
    for m in tl.static_range(L + 1):
        before, before_dot, slope_before, slope_before_dot = zero, zero, zero, zero
        p, p_dot, slope, slope_dot = top, zero, zero, zero
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * before) / (l - m)
                after_dot = ((2 * l - 1) * (y_dot * p + y * p_dot) - (l + m - 1) * before_dot) / (l - m)
                slope_after = ((2 * l - 1) * (p + y * slope) - (l + m - 1) * slope_before) / (l - m)
                slope_after_dot = (2 * l - 1) * (p_dot + y_dot * slope + y * slope_dot)
                slope_after_dot = (slope_after_dot - (l + m - 1) * slope_before_dot) / (l - m)
                before, before_dot, slope_before, slope_before_dot = p, p_dot, slope, slope_dot
                p, p_dot, slope, slope_dot = after, after_dot, slope_after, slope_after_dot
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * tl.load(grad + at + l * l + l + m, mask=inside, other=0.0)
            h = scale * tl.load(grad_dot + at + l * l + l + m, mask=inside, other=0.0)
            gx, gy, gz, total = add_slopes(gx, gy, gz, total, g, p, slope, p, c, cx, cz)
            hx, hy, hz, other = add_slopes(hx, hy, hz, other, h, p, slope, p, c, cx, cz)
            hx_dot += h * (p_dot * cx + p * cx_dot)
            hy_dot += h * (slope_dot * c + slope * c_dot)
            hz_dot += h * (p_dot * cz + p * cz_dot)
            other_dot += h * (p_dot * c + p * c_dot)
            if m > 0:
                g = scale * tl.load(grad + at + l * l + l - m, mask=inside, other=0.0)
                h = scale * tl.load(grad_dot + at + l * l + l - m, mask=inside, other=0.0)
                gx, gy, gz, total = add_slopes(gx, gy, gz, total, g, p, slope, p, s, sx, sz)
                hx, hy, hz, other = add_slopes(hx, hy, hz, other, h, p, slope, p, s, sx, sz)
                hx_dot += h * (p_dot * sx + p * sx_dot)
                hy_dot += h * (slope_dot * s + slope * s_dot)
                hz_dot += h * (p_dot * sz + p * sz_dot)
                other_dot += h * (p_dot * s + p * s_dot)
        top = top * (2 * m + 1)
        cx_dot, cz_dot, sx_dot, sz_dot = next_order_slopes_dot(
            c_dot, s_dot, cx, cz, sx, sz, cx_dot, cz_dot, sx_dot, sz_dot, x, z, x_dot, z_dot
        )
        cx, cz, sx, sz = next_order_slopes(c, s, cx, cz, sx, sz, x, z)
        c_dot, s_dot = next_order_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot)
        c, s = next_order(c, s, x, z)
    along = gx * x + gy * y + gz * z
    across = hx * x + hy * y + hz * z
    across_dot = hx_dot * x + hy_dot * y + hz_dot * z + hx * x_dot + hy * y_dot + hz * z_dot
    # what multiplies g - <g, n> n, h - <h, n> n and the change of the latter
    by_g = u / d
    by_h = (du - by_g) * d_dot / d
    radial = du * total + tl.load(grad_distance + e, mask=inside, other=0.0)
    radial += envelope_bend(d, lower, upper, ENVELOPE) * d_dot * other + du * other_dot
    turn = du * other + tl.load(grad_distance_dot + e, mask=inside, other=0.0)
    vx = by_g * (gx - along * x + hx_dot - across_dot * x - across * x_dot) + by_h * (hx - across * x)
    vy = by_g * (gy - along * y + hy_dot - across_dot * y - across * y_dot) + by_h * (hy - across * y)
    vz = by_g * (gz - along * z + hz_dot - across_dot * z - across * z_dot) + by_h * (hz - across * z)
    vx, vy, vz = vx + radial * x + turn * x_dot, vy + radial * y + turn * y_dot, vz + radial * z + turn * z_dot
    store_vector(out, e, inside, vx, vy, vz)


def harmonics_tangent(vec: Tensor, vec_dot: Tensor, spec: EmbeddingSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lengths [E], their changes along vec_dot, u(d) Y / mean degree [E, (lmax+1)^2], their changes. No gradient."""
    edges = vec.shape[0]
    distance, distance_dot = vec.new_empty(edges), vec.new_empty(edges)
    out, out_dot = (vec.new_empty(edges, (spec.lmax + 1) ** 2) for _ in range(2))
    if edges:
        grid, scales = _grid_and_scales(vec, spec)
        harmonics_tangent_kernel[grid](
            vec, vec_dot, scales, distance, distance_dot, out, out_dot, edges, **_edge_constants(spec)
        )
    return distance, distance_dot, out, out_dot


def harmonics_second(
    grad: Tensor,
    grad_dot: Tensor,
    grad_distance: Tensor,
    grad_distance_dot: Tensor,
    vec: Tensor,
    vec_dot: Tensor,
    spec: EmbeddingSpec,
    out: Tensor,
) -> None:
    """Gradient of :func:`harmonics_tangent` by vec, to out [E, 3], from those by its results."""
    if vec.shape[0]:
        grid, scales = _grid_and_scales(vec, spec)
        given = grad, grad_dot, grad_distance, grad_distance_dot, vec, vec_dot
        harmonics_second_kernel[grid](*given, scales, out, vec.shape[0], **_edge_constants(spec))


@triton.jit
def harmonic_sum_kernel(harmonics, features, row_ptr, out, M, L, K, BM: tl.constexpr, BK: tl.constexpr):
    """out[i, m, c] = sum over edges e of i of Y[e, m] a[e, l(m), c]."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    m = tl.arange(0, BM)
    mask = (m[:, None] < M) & (c[None, :] < K)
    at = degree_of(m)[:, None] * K + c[None, :]
    total = tl.zeros([BM, BK], dtype=out.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=m < M, other=0.0)
        total += y[:, None] * tl.load(features + e * L * K + at, mask=mask, other=0.0)
    tl.store(out + i * M * K + m[:, None] * K + c[None, :], total, mask=mask)


@triton.jit
def harmonic_features_kernel(harmonics, grad, row_ptr, out, M, L, K, BL: tl.constexpr, BK: tl.constexpr):
    """out[e, l, c] = sum over the rows m of degree l of Y[e, m] g[i(e), m, c]."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = c < K
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        for l in tl.static_range(BL):
            total = tl.zeros([BK], dtype=out.dtype.element_ty)
            for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                g = tl.load(grad + (i * M + m) * K + c, mask=inside, other=0.0)
                total += tl.load(harmonics + e * M + m) * g
            tl.store(out + (e * L + l) * K + c, total, mask=inside)


@triton.jit
def harmonic_dot_kernel(features, grad, row_ptr, out, M, L, K, BM: tl.constexpr, BK: tl.constexpr):
    """out[e, m] = sum over c of a[e, l(m), c] g[i(e), m, c]. BK covers all columns."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BK)
    m = tl.arange(0, BM)
    mask = (m[:, None] < M) & (c[None, :] < K)
    g = tl.load(grad + i * M * K + m[:, None] * K + c[None, :], mask=mask, other=0.0)
    at = degree_of(m)[:, None] * K + c[None, :]
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        a = tl.load(features + e * L * K + at, mask=mask, other=0.0)
        tl.store(out + e * M + m, tl.sum(a * g, axis=1), mask=m < M)


def _warps(numbers: int) -> int:
    return 4 if numbers >= 2048 else 2


def harmonic_sum(harmonics: Tensor, features: Tensor, row_ptr: Tensor) -> Tensor:
    """sum_e Y_em a_e,l(m),c. harmonics: [E, M]; features: [E, L, K]. Returns [N, M, K]."""
    (_, rows), (_, degrees, width) = harmonics.shape, features.shape
    nodes = row_ptr.numel() - 1
    out = features.new_empty(nodes, rows, width)
    if out.numel():
        block = min(next_power(width), 128)
        harmonic_sum_kernel[nodes, math.ceil(width / block)](
            harmonics, features, row_ptr, out, rows, degrees, width,
            BM=next_power(rows), BK=block, num_warps=_warps(next_power(rows) * block),
        )  # fmt: skip
    return out


def harmonic_features(harmonics: Tensor, grad: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """out = sum over m of degree l of Y_em g_imc. harmonics: [E, M]; grad: [N, M, K]; out: [E, L, K]."""
    (_, degrees, width), (nodes, rows, _) = out.shape, grad.shape
    if out.numel():
        block = min(next_power(width), 128)
        harmonic_features_kernel[nodes, math.ceil(width / block)](
            harmonics, grad, row_ptr, out, rows, degrees, width, BL=degrees, BK=block, num_warps=1
        )


def harmonic_dot(features: Tensor, grad: Tensor, row_ptr: Tensor) -> Tensor:
    """<a_e,l(m), g_im>. features: [E, L, K]; grad: [N, M, K]. Returns [E, M]."""
    (edges, degrees, width), (nodes, rows, _) = features.shape, grad.shape
    out = grad.new_empty(edges, rows)
    if out.numel():
        harmonic_dot_kernel[(nodes,)](
            features, grad, row_ptr, out, rows, degrees, width,
            BM=next_power(rows), BK=next_power(width), num_warps=_warps(next_power(rows) * next_power(width)),
        )  # fmt: skip
    return out


def segment_sum(values: Tensor, row_ptr: Tensor) -> Tensor:
    """Sum of rows per receiver, in a fixed order. values: [E, H]. Returns [N, H]."""
    return torch.segment_reduce(values, "sum", offsets=row_ptr, axis=0, initial=0)


def joined(sums: Tensor, total: Tensor) -> Tensor:
    """[N, M, h + PAD]: the sums of features [N, M, h], the sum of y [N, M], and zeros that keep rows aligned."""
    return torch.cat([sums, F.pad(total.unsqueeze(-1), (0, PAD - 1))], -1)


def apart(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the sums of features and of the sum of y from that of :func:`joined`."""
    return grad[..., :-PAD].contiguous(), grad[..., -PAD]


@triton.jit
def place_kernel(
    distance, source, target, species, target_species, pair_row, row, position, E, Z, intervals, knots_per_length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row and position of every edge in the splines."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    zi = tl.load(target_species + tl.load(target + e, mask=inside, other=0), mask=inside, other=0)
    zj = tl.load(species + tl.load(source + e, mask=inside, other=0), mask=inside, other=0)
    d = tl.load(distance + e, mask=inside, other=0.0)
    k, f = place(d, zi, zj, pair_row, inside, Z, intervals, knots_per_length)
    tl.store(row + e, k, mask=inside)
    tl.store(position + e, f, mask=inside)


@triton.jit
def spline_sum_kernel(
    harmonics, knots, row, position, row_ptr, out,
    L: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[i, m, c] = sum over edges e of i of Y[e, m] a[e, l, c] for the rows m of one degree l; column K: sum of Y."""
    i = tl.program_id(0).to(tl.int64)
    l = tl.program_id(1)
    c = tl.program_id(2) * BK + tl.arange(0, BK)
    m = tl.arange(0, BM)
    inside = c < K
    mine = m < 2 * l + 1
    M: tl.constexpr = L * L
    total = tl.zeros([BM, BK], dtype=out.dtype.element_ty)
    count = tl.zeros([BM], dtype=out.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + l * l + m, mask=mine, other=0.0)
        a = feature(knots, row, position, e, l * K + c, inside, L * K, True, K % BK != 0)
        total += y[:, None] * a[None, :]
        count += y
    at = out + (i * M + l * l + m) * (K + PAD)
    tl.store(at[:, None] + c[None, :], total, mask=mine[:, None] & inside[None, :])
    if tl.program_id(2) == 0:
        tl.store(at + K, count, mask=mine)
        for p in tl.static_range(1, PAD):
            tl.store(at + K + p, 0.0 * count, mask=mine)


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def spline_backward_kernel(
    harmonics, knots, row, position, grad, row_ptr, grad_harmonics, slope, E, knots_per_length,
    L: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From grad [n, M, K + PAD] of spline_sum_kernel's result: by the harmonics [E, M], by the length in slope [L, E].

    One program: one receiver, the rows of one degree, all columns.
    """
    i = tl.program_id(0).to(tl.int64)
    l = tl.program_id(1)
    c = tl.arange(0, BK)
    m = tl.arange(0, BM)
    inside = c < K
    mine = m < 2 * l + 1
    M: tl.constexpr = L * L
    at = grad + (i * M + l * l + m) * (K + PAD)
    g = tl.load(at[:, None] + c[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
    direct = tl.load(at + K, mask=mine, other=0.0)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + l * l + m, mask=mine, other=0.0)
        at_row, f = tl.load(row + e).to(tl.int64), tl.load(position + e)
        a, da = spline_and_slope(knots, at_row, f, l * K + c, inside, knots_per_length, L * K, K % BK != 0)
        tl.store(grad_harmonics + e * M + l * l + m, tl.sum(a[None, :] * g, axis=1) + direct, mask=mine)
        tl.store(slope + l * E.to(tl.int64) + e, tl.sum(tl.sum(y[:, None] * g, axis=0) * da, axis=0))


def place_edges(splines: RadialSplines, distance: Tensor, chunk: EdgeChunk) -> tuple[Tensor, Tensor]:
    """Where a chunk's edges lie in the splines: rows and positions. distance: [e]."""
    row, position = torch.empty_like(distance, dtype=torch.int32), torch.empty_like(distance)
    if chunk.num_edges:
        place_kernel[(math.ceil(chunk.num_edges / 256),)](
            distance, chunk.source, chunk.target, chunk.species, chunk.species[chunk.nodes], splines.pair_row, row,
            position, chunk.num_edges, splines.pair_row.shape[0], splines.intervals, splines.scale, BLOCK=256,
        )  # fmt: skip
    return row, position


def _constants(harmonics: Tensor, splines: RadialSplines) -> dict:
    degrees = round(harmonics.shape[1] ** 0.5)
    return {"L": degrees, "K": splines.knots.shape[-1] // degrees, "PAD": PAD, "BM": next_power(2 * degrees - 1)}


def spline_sum(harmonics: Tensor, splines: RadialSplines, placed: tuple[Tensor, Tensor], row_ptr: Tensor) -> Tensor:
    """[n, M, K + PAD]: the sums of Y a, the sum of Y, zeros. harmonics: [e, M]."""
    constants, nodes = _constants(harmonics, splines), row_ptr.numel() - 1
    degrees, width = constants["L"], constants["K"]
    out = harmonics.new_empty(nodes, degrees * degrees, width + PAD)
    if nodes:
        block = min(next_power(width), 128)
        spline_sum_kernel[nodes, degrees, math.ceil(width / block)](
            harmonics, splines.knots, *placed, row_ptr, out, BK=block, num_warps=1, **constants
        )
    return out


def spline_backward(
    harmonics: Tensor, splines: RadialSplines, placed: tuple[Tensor, Tensor], row_ptr: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`spline_sum` by the harmonics [e, M] and by the lengths [e]. grad: contiguous."""
    edges, constants = harmonics.shape[0], _constants(harmonics, splines)
    degrees, width = constants["L"], constants["K"]
    by_harmonics, slope = torch.empty_like(harmonics), harmonics.new_empty(degrees, edges)
    if edges:
        spline_backward_kernel[row_ptr.numel() - 1, degrees](
            harmonics, splines.knots, *placed, grad, row_ptr, by_harmonics, slope, edges, splines.scale,
            BK=next_power(width), num_warps=1 if width <= 128 else 4, **constants,
        )  # fmt: skip
    return by_harmonics, slope.sum(0)
