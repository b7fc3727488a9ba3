"""Triton kernels on single edges: geometry and place in the splines, its reverse, and both along a change of the
vectors.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from e2former_kernels.common.envelope import envelope_bend, envelope_of
from e2former_kernels.common.harmonics import load_vector, store_vector
from e2former_kernels.equivariant_attention.message import (
    add_scale_reverse,
    add_scale_second,
    store_scale,
    store_scale_tangent,
    total_of,
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
    store_scale(scale, e, inside, x, y, z, d, V2, ORDER, B)


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
    stride = E.to(tl.int64)
    plane = stride * S
    g = du * total_of(grad_parts + B * plane + e, stride, inside, S)
    if PARTS:
        g += total_of(grad_parts + (B + 1) * plane + e, stride, inside, S)
    else:
        g += tl.load(grad_distance + e, mask=inside, other=0.0)
    gx, gy, gz = 0.0, 0.0, 0.0
    if ORDER > 0:
        g, gx, gy, gz = add_scale_reverse(g, grad_parts, e, stride, plane, inside, x, y, z, d, S, V2, B)
    g = g / d
    vx, vy, vz = g * x, g * y, g * z
    if B > 1:
        vx += gx
        vy += gy
        vz += gz
    store_vector(grad_vec, e, inside, vx, vy, vz)


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
    store_scale_tangent(scale, scale_dot, e, inside, x, y, z, d, cx, cy, cz, d_dot, V2, ORDER, B)


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
    gu_dot = tl.load(grad_envelope_dot + e, mask=inside, other=0.0)
    # by d and by d'
    g = tl.load(grad_distance + e, mask=inside, other=0.0) + du * tl.load(grad_envelope + e, mask=inside, other=0.0)
    g += gu_dot * envelope_bend(d, lower, upper, ENVELOPE) * d_dot
    g_dot = tl.load(grad_distance_dot + e, mask=inside, other=0.0) + gu_dot * du
    vx = 0.0 * x
    vy = vx
    vz = vx
    if ORDER > 0:
        g, g_dot, vx, vy, vz = add_scale_second(
            g, g_dot, vx, vy, vz, grad_scale, e, inside, E, tiles, x, y, z, d, cx, cy, cz, d_dot, V2, B
        )
    g_dot = g_dot / d
    vx += g * x_unit + g_dot * (cx - d_dot * x_unit)
    vy += g * y_unit + g_dot * (cy - d_dot * y_unit)
    vz += g * z_unit + g_dot * (cz - d_dot * z_unit)
    store_vector(grad_vec, e, inside, vx, vy, vz)
