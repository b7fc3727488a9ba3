"""Triton kernels on single edges: geometry and place in the splines, its reverse, and both along a change of the
vectors.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from e2former_kernels.common.envelope import envelope_bend, envelope_of
from e2former_kernels.common.harmonics import (
    degree_two,
    degree_two_back,
    degree_two_dot,
    load_vector,
    store_vector,
)
from e2former_kernels.equivariant_attention.reference import AttentionSpec
from e2former_kernels.radial.splines import place


@functools.lru_cache(maxsize=64)
def constants_of(spec: AttentionSpec, directions: int, block: int) -> dict:
    """Arguments of all of these kernels but the edges'."""
    return spec.envelope.arguments | {
        "V2": spec.inverse_distance == "v2",
        "ORDER": spec.order,
        "B": directions,
        "BLOCK": block,
    }


@triton.jit
def inverse_of(d, V2: tl.constexpr):
    """1/d as the specification regularises it, and its derivative."""
    if V2:
        inv = 1.0 / (d + 1e-8)
        slope = -inv * inv
    else:
        inv = 1.0 / tl.maximum(d, 1e-6)
        slope = tl.where(d > 1e-6, -inv * inv, 0.0)
    return inv, slope


@triton.jit
def store_scale(scale, e, inside, x, y, z, s, B: tl.constexpr):
    """Row e of scale [E, B]: x, y, z and the five of degree 2."""
    tl.store(scale + B * e, x, mask=inside)
    tl.store(scale + B * e + 1, y, mask=inside)
    tl.store(scale + B * e + 2, z, mask=inside)
    if B == 8:
        for k in tl.static_range(5):
            tl.store(scale + B * e + 3 + k, s[k], mask=inside)


@triton.jit
def geometry_kernel(
    vec, distance, envelope, scale, row, source, target, species, target_species, pair_row,
    E, Z, intervals, knots_per_length, lower, upper,
    ENVELOPE: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr,
    SPLINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Envelope, message scale (direction and harmonics of degree 2; direction; 1/d; or 1) and length of every edge.

    SPLINE: instead of the length its position in the spline's interval, 0 to 1, and in ``row`` the interval's
    first row. species: of the senders; target_species: of the chunk's receivers. pair_row: [Z, Z].
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z = load_vector(vec, e, inside, 1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    u, _ = envelope_of(d, lower, upper, ENVELOPE)
    tl.store(envelope + e, u, mask=inside)
    if SPLINE:
        zi = tl.load(target_species + tl.load(target + e, mask=inside, other=0), mask=inside, other=0)
        zj = tl.load(species + tl.load(source + e, mask=inside, other=0), mask=inside, other=0)
        k, f = place(d, zi, zj, pair_row, inside, Z, intervals, knots_per_length)
        tl.store(row + e, k, mask=inside)
        tl.store(distance + e, f, mask=inside)
    else:
        tl.store(distance + e, d, mask=inside)
    inv, _ = inverse_of(d, V2)
    if B > 1:
        x, y, z = x * inv, y * inv, z * inv
        store_scale(scale, e, inside, x, y, z, degree_two(x, y, z), B)
    else:
        if ORDER == 0:
            inv = 0.0 * inv + 1.0
        tl.store(scale + e, inv, mask=inside)


@triton.jit
def _total(parts, e, stride, inside, S: tl.constexpr):
    """Sum of S numbers [S, stride] for every edge."""
    total = tl.load(parts + e, mask=inside, other=0.0)
    for s in tl.static_range(1, S):
        total += tl.load(parts + s * stride + e, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def geometry_backward_kernel(
    vec, grad_distance, grad_parts, grad_vec, E, lower, upper,
    ENVELOPE: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by the edge vector.

    grad_parts: [B + 1 (+ 1), S, E], gradients by the message scale, the envelope (and with PARTS the length) in S parts
    that are added up here; grad_distance: [E], by the length, without PARTS.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z = load_vector(vec, e, inside, 1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    _, du = envelope_of(d, lower, upper, ENVELOPE)
    inv, slope = inverse_of(d, V2)
    stride = E.to(tl.int64)
    plane = stride * S
    g = du * _total(grad_parts + B * plane, e, stride, inside, S)
    if PARTS:
        g += _total(grad_parts + (B + 1) * plane, e, stride, inside, S)
    else:
        g += tl.load(grad_distance + e, mask=inside, other=0.0)
    if B > 1:
        gx = _total(grad_parts, e, stride, inside, S)
        gy = _total(grad_parts + plane, e, stride, inside, S)
        gz = _total(grad_parts + 2 * plane, e, stride, inside, S)
        if B == 8:
            further = ()
            for k in tl.static_range(3, 8):
                further = further + (_total(grad_parts + k * plane, e, stride, inside, S),)
            ax, ay, az = degree_two_back(
                further[0], further[1], further[2], further[3], further[4], x * inv, y * inv, z * inv
            )
            gx += ax
            gy += ay
            gz += az
        g += slope * (gx * x + gy * y + gz * z)
    elif ORDER > 0:
        g += slope * _total(grad_parts, e, stride, inside, S)
    g = g / d
    vx, vy, vz = g * x, g * y, g * z
    if B > 1:
        vx += gx * inv
        vy += gy * inv
        vz += gz * inv
    store_vector(grad_vec, e, inside, vx, vy, vz)


@triton.jit
def _inverse_bend(d, V2: tl.constexpr):
    """Second derivative of 1/d as the specification regularises it."""
    if V2:
        inv = 1.0 / (d + 1e-8)
        bend = 2.0 * inv * inv * inv
    else:
        inv = 1.0 / tl.maximum(d, 1e-6)
        bend = tl.where(d > 1e-6, 2.0 * inv * inv * inv, 0.0)
    return bend


@triton.jit
def geometry_tangent_kernel(
    vec, vec_dot, distance, distance_dot, envelope, envelope_dot, scale, scale_dot, E, lower, upper,
    ENVELOPE: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Length, envelope and message scale of every edge, and their changes along vec_dot."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z = load_vector(vec, e, inside, 1.0)
    cx, cy, cz = load_vector(vec_dot, e, inside, 0.0)
    d = tl.sqrt(x * x + y * y + z * z)
    d_dot = (x * cx + y * cy + z * cz) / d
    u, du = envelope_of(d, lower, upper, ENVELOPE)
    tl.store(distance + e, d, mask=inside)
    tl.store(distance_dot + e, d_dot, mask=inside)
    tl.store(envelope + e, u, mask=inside)
    tl.store(envelope_dot + e, du * d_dot, mask=inside)
    inv, slope = inverse_of(d, V2)
    inv_dot = slope * d_dot
    if B > 1:
        cx, cy, cz = cx * inv + x * inv_dot, cy * inv + y * inv_dot, cz * inv + z * inv_dot
        x, y, z = x * inv, y * inv, z * inv
        store_scale(scale, e, inside, x, y, z, degree_two(x, y, z), B)
        store_scale(scale_dot, e, inside, cx, cy, cz, degree_two_dot(x, y, z, cx, cy, cz), B)
    else:
        if ORDER == 0:
            inv = 0.0 * inv + 1.0
            inv_dot = 0.0 * inv
        tl.store(scale + e, inv, mask=inside)
        tl.store(scale_dot + e, inv_dot, mask=inside)


@triton.jit
def _totals(parts, e, inside, E, tiles, N: tl.constexpr):
    """Sum over the tiles of parts [tiles, E, N], a tuple."""
    totals = ()
    for n in tl.static_range(N):
        totals = totals + (tl.load(parts + e * N + n, mask=inside, other=0.0),)
    for k in range(1, tiles):
        added = ()
        for n in tl.static_range(N):
            added = added + (totals[n] + tl.load(parts + (k * E + e) * N + n, mask=inside, other=0.0),)
        totals = added
    return totals


@triton.jit
def geometry_second_kernel(
    vec, vec_dot, grad_distance, grad_distance_dot, grad_envelope, grad_envelope_dot, grad_scale, grad_vec,
    E, lower, upper, tiles,
    ENVELOPE: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by vec from those by everything that geometry_tangent_kernel returns.

    grad_scale: [tiles, E, 2 B], to be added up: by scale, then by scale_dot.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z = load_vector(vec, e, inside, 1.0)
    cx, cy, cz = load_vector(vec_dot, e, inside, 0.0)
    d = tl.sqrt(x * x + y * y + z * z)
    x_unit, y_unit, z_unit = x / d, y / d, z / d
    d_dot = x_unit * cx + y_unit * cy + z_unit * cz
    _, du = envelope_of(d, lower, upper, ENVELOPE)
    inv, slope = inverse_of(d, V2)
    gu_dot = tl.load(grad_envelope_dot + e, mask=inside, other=0.0)
    # by d and by d'
    g = tl.load(grad_distance + e, mask=inside, other=0.0) + du * tl.load(grad_envelope + e, mask=inside, other=0.0)
    g += gu_dot * envelope_bend(d, lower, upper, ENVELOPE) * d_dot
    g_dot = tl.load(grad_distance_dot + e, mask=inside, other=0.0) + gu_dot * du
    vx = 0.0 * x
    vy = vx
    vz = vx
    if ORDER > 0:
        # the value enters through s = p (1/d), p = vec or 1, and its change p' (1/d) + p (1/d)_d d'
        bend = _inverse_bend(d, V2)
        s = _totals(grad_scale, e, inside, E, tiles, 2 * B)
        if B > 1:
            gs0, gs1, gs2, hs0, hs1, hs2 = s[0], s[1], s[2], s[B], s[B + 1], s[B + 2]
            if B == 8:  # and through harmonics of s, quadratic in it
                inv_dot = slope * d_dot
                a, b, c = degree_two_back(s[3], s[4], s[5], s[6], s[7], x * inv, y * inv, z * inv)
                gs0, gs1, gs2 = gs0 + a, gs1 + b, gs2 + c
                a, b, c = degree_two_back(
                    s[11], s[12], s[13], s[14], s[15],
                    cx * inv + x * inv_dot, cy * inv + y * inv_dot, cz * inv + z * inv_dot,
                )  # fmt: skip
                gs0, gs1, gs2 = gs0 + a, gs1 + b, gs2 + c
                a, b, c = degree_two_back(s[11], s[12], s[13], s[14], s[15], x * inv, y * inv, z * inv)
                hs0, hs1, hs2 = hs0 + a, hs1 + b, hs2 + c
            along = gs0 * x + gs1 * y + gs2 * z
            along_dot = hs0 * x + hs1 * y + hs2 * z
            g += slope * (along + hs0 * cx + hs1 * cy + hs2 * cz)
            vx += gs0 * inv + hs0 * slope * d_dot
            vy += gs1 * inv + hs1 * slope * d_dot
            vz += gs2 * inv + hs2 * slope * d_dot
        else:
            along_dot = s[1]
            g += slope * s[0]
        g += bend * d_dot * along_dot
        g_dot += slope * along_dot
    g_dot = g_dot / d
    vx += g * x_unit + g_dot * (cx - d_dot * x_unit)
    vy += g * y_unit + g_dot * (cy - d_dot * y_unit)
    vz += g * z_unit + g_dot * (cz - d_dot * z_unit)
    store_vector(grad_vec, e, inside, vx, vy, vz)
