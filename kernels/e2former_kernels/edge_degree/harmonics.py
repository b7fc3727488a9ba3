"""Weighted harmonics of edge vectors: value, reverse, tangent, and reverse of value and tangent.

Kernels, as autograd of :func:`solid_harmonics` would keep some hundred numbers of every edge.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.envelope import envelope_bend, envelope_of
from e2former_kernels.common.harmonics import (
    add_slopes,
    harmonic_scales,
    next_order,
    next_order_dot,
    next_order_slopes,
    next_order_slopes_dot,
    store_vector,
    vector_dot,
    vector_of,
)
from e2former_kernels.edge_degree.reference import AVERAGE_DEGREE, EmbeddingSpec


def _constants(spec: EmbeddingSpec) -> dict:
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
        harmonics_kernel[grid](vec, scales, distance, out, edges, **_constants(spec))
    return distance, out


def weighted_harmonics_backward(
    grad: Tensor, grad_distance: Tensor, vec: Tensor, spec: EmbeddingSpec, out: Tensor
) -> None:
    """Gradient of :func:`weighted_harmonics` by vec, to out [E, 3]."""
    if vec.shape[0]:
        grid, scales = _grid_and_scales(vec, spec)
        harmonics_backward_kernel[grid](
            grad.contiguous(), grad_distance.contiguous(), vec, scales, out, vec.shape[0], **_constants(spec)
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
            vec, vec_dot, scales, distance, distance_dot, out, out_dot, edges, **_constants(spec)
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
        harmonics_second_kernel[grid](*given, scales, out, vec.shape[0], **_constants(spec))
