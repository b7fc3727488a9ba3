"""Triton kernels on single edges: geometry, place in the radial table, and the gradient by the edge vector."""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.envelope_kernel import polynomial
from e2former_kernels.common.spline_kernel import place


@triton.jit
def _bell(d, lower, upper):
    t = (2.0 * d - (lower + upper)) / (upper - lower)
    gap = tl.maximum(1.0 - t * t, 0.0)
    return gap * gap, -8.0 * gap * t / (upper - lower)


@triton.jit
def envelope_of(d, lower, upper, P: tl.constexpr, BELL: tl.constexpr):
    """The envelope and its derivative."""
    if BELL:
        u, du = _bell(d, lower, upper)
    else:
        u, du = polynomial(d, upper, P)
    return u, du


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
def geometry_kernel(
    vec, distance, envelope, scale, row, source, target, species, target_species, pair_row,
    E, Z, intervals, knots_per_length, lower, upper,
    P: tl.constexpr, BELL: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr,
    TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Envelope and message scale (the direction; 1/d; or 1) of every edge, and its length.

    TABLE: instead of the length its position in the interval of the radial table, 0 to 1, and in ``row`` the interval's
    first row. species: of the senders; target_species: of the run's receivers. pair_row: [Z, Z].
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(vec + 3 * e, mask=inside, other=1.0)
    y = tl.load(vec + 3 * e + 1, mask=inside, other=1.0)
    z = tl.load(vec + 3 * e + 2, mask=inside, other=1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    u, _ = envelope_of(d, lower, upper, P, BELL)
    tl.store(envelope + e, u, mask=inside)
    if TABLE:
        zi = tl.load(target_species + tl.load(target + e, mask=inside, other=0), mask=inside, other=0)
        zj = tl.load(species + tl.load(source + e, mask=inside, other=0), mask=inside, other=0)
        k, f = place(d, zi, zj, pair_row, inside, Z, intervals, knots_per_length)
        tl.store(row + e, k, mask=inside)
        tl.store(distance + e, f, mask=inside)
    else:
        tl.store(distance + e, d, mask=inside)
    inv, _ = inverse_of(d, V2)
    if B == 3:
        tl.store(scale + 3 * e, x * inv, mask=inside)
        tl.store(scale + 3 * e + 1, y * inv, mask=inside)
        tl.store(scale + 3 * e + 2, z * inv, mask=inside)
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
    P: tl.constexpr, BELL: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by the edge vector.

    grad_parts: [B + 1 (+ 1), S, E], gradients by the message scale, the envelope (and with PARTS the length) in S parts
    that are added up here; grad_distance: [E], by the length, without PARTS.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(vec + 3 * e, mask=inside, other=1.0)
    y = tl.load(vec + 3 * e + 1, mask=inside, other=1.0)
    z = tl.load(vec + 3 * e + 2, mask=inside, other=1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    _, du = envelope_of(d, lower, upper, P, BELL)
    inv, slope = inverse_of(d, V2)
    stride = E.to(tl.int64)
    plane = stride * S
    g = du * _total(grad_parts + B * plane, e, stride, inside, S)
    if PARTS:
        g += _total(grad_parts + (B + 1) * plane, e, stride, inside, S)
    else:
        g += tl.load(grad_distance + e, mask=inside, other=0.0)
    if B == 3:
        gx = _total(grad_parts, e, stride, inside, S)
        gy = _total(grad_parts + plane, e, stride, inside, S)
        gz = _total(grad_parts + 2 * plane, e, stride, inside, S)
        g += slope * (gx * x + gy * y + gz * z)
    elif ORDER == 1:
        g += slope * _total(grad_parts, e, stride, inside, S)
    g = g / d
    vx, vy, vz = g * x, g * y, g * z
    if B == 3:
        vx += gx * inv
        vy += gy * inv
        vz += gz * inv
    tl.store(grad_vec + 3 * e, vx, mask=inside)
    tl.store(grad_vec + 3 * e + 1, vy, mask=inside)
    tl.store(grad_vec + 3 * e + 2, vz, mask=inside)
