"""Triton kernels of the fused value and first derivative: geometry of edges, scores, softmax, and their backward."""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.envelope_kernel import polynomial


@triton.jit
def _bell(d, lower, upper):
    t = (2.0 * d - (lower + upper)) / (upper - lower)
    gap = tl.maximum(1.0 - t * t, 0.0)
    return gap * gap, -8.0 * gap * t / (upper - lower)


@triton.jit
def _envelope(d, lower, upper, P: tl.constexpr, BELL: tl.constexpr):
    if BELL:
        u, du = _bell(d, lower, upper)
    else:
        u, du = polynomial(d, upper, P)
    return u, du


@triton.jit
def _inverse(d, V2: tl.constexpr):
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
    vec, distance, envelope, scale, E, lower, upper,
    P: tl.constexpr, BELL: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Length, envelope and message scale (the direction; 1/d; or 1) of every edge."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(vec + 3 * e, mask=inside, other=1.0)
    y = tl.load(vec + 3 * e + 1, mask=inside, other=1.0)
    z = tl.load(vec + 3 * e + 2, mask=inside, other=1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    u, _ = _envelope(d, lower, upper, P, BELL)
    tl.store(distance + e, d, mask=inside)
    tl.store(envelope + e, u, mask=inside)
    inv, _ = _inverse(d, V2)
    if B == 3:
        tl.store(scale + 3 * e, x * inv, mask=inside)
        tl.store(scale + 3 * e + 1, y * inv, mask=inside)
        tl.store(scale + 3 * e + 2, z * inv, mask=inside)
    else:
        if ORDER == 0:
            inv = 0.0 * inv + 1.0
        tl.store(scale + e, inv, mask=inside)


@triton.jit
def geometry_backward_kernel(
    vec, grad_distance, grad_envelope, grad_scale, grad_vec, E, lower, upper,
    P: tl.constexpr, BELL: tl.constexpr, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient by the edge vector from those by length, envelope and scale."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(vec + 3 * e, mask=inside, other=1.0)
    y = tl.load(vec + 3 * e + 1, mask=inside, other=1.0)
    z = tl.load(vec + 3 * e + 2, mask=inside, other=1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    _, du = _envelope(d, lower, upper, P, BELL)
    inv, slope = _inverse(d, V2)
    g = tl.load(grad_distance + e, mask=inside, other=0.0) + du * tl.load(grad_envelope + e, mask=inside, other=0.0)
    if B == 3:
        gx = tl.load(grad_scale + 3 * e, mask=inside, other=0.0)
        gy = tl.load(grad_scale + 3 * e + 1, mask=inside, other=0.0)
        gz = tl.load(grad_scale + 3 * e + 2, mask=inside, other=0.0)
        g += slope * (gx * x + gy * y + gz * z)
    elif ORDER == 1:
        g += slope * tl.load(grad_scale + e, mask=inside, other=0.0)
    g = g / d
    vx, vy, vz = g * x, g * y, g * z
    if B == 3:
        vx += gx * inv
        vy += gy * inv
        vz += gz * inv
    tl.store(grad_vec + 3 * e, vx, mask=inside)
    tl.store(grad_vec + 3 * e + 1, vy, mask=inside)
    tl.store(grad_vec + 3 * e + 2, vz, mask=inside)


@triton.jit
def _sigmoid(a):
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def _softplus(a):
    return tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))


@triton.jit
def weights_kernel(
    query, key, features, envelope, source, row_ptr, pair, weight, top, total, H, S, inverse_root, eps,
    NORM: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Attention weights of the edges of one receiver. One program: one receiver, BH heads.

    a = g <q, k> / sqrt(S), w as in the reference's ``attention_weights``. NORM: 0 smooth, 1 molfm, 2 softplus,
    3 sigmoid. KEEP: also store <q, k> / sqrt(S) in ``pair`` and the softmax's shift and sum in ``top`` and ``total``.
    """
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    s = tl.arange(0, BS)
    in_h = h < H
    at = h[:, None] * S + s[None, :]
    mask = in_h[:, None] & (s[None, :] < S)
    first, last = tl.load(row_ptr + i), tl.load(row_ptr + i + 1)
    q = tl.load(query + i * H * S + at, mask=mask, other=0.0)
    m = tl.zeros([BH], dtype=weight.dtype.element_ty)
    if NORM == 1:
        m = m - float("inf")
    t = tl.zeros([BH], dtype=weight.dtype.element_ty)
    for e in range(first, last):
        j = tl.load(source + e).to(tl.int64)
        k = tl.load(key + j * H * S + at, mask=mask, other=0.0)
        a = tl.sum(q * k, axis=1) * inverse_root
        if KEEP:
            tl.store(pair + e * H + h, a, mask=in_h)
        a = a * tl.load(features + e * 2 * H + h, mask=in_h, other=0.0)
        u = tl.load(envelope + e)
        if NORM <= 1:
            shift = tl.maximum(m, a)
            t = t * tl.exp(m - shift) + tl.exp(a - shift) * u
            m = shift
            tl.store(weight + e * H + h, a, mask=in_h)
        else:
            p = tl.load(features + e * 2 * H + H + h, mask=in_h, other=0.0)
            f = _softplus(a) if NORM == 2 else _sigmoid(a)
            tl.store(weight + e * H + h, f * u * p, mask=in_h)
    if NORM <= 1:
        if NORM == 0:
            t += eps * tl.exp(-m)
        else:
            t += eps
        if KEEP:
            tl.store(top + i * H + h, m, mask=in_h)
            tl.store(total + i * H + h, t, mask=in_h)
        tl.debug_barrier()
        for e in range(first, last):
            a = tl.load(weight + e * H + h, mask=in_h, other=0.0)
            u = tl.load(envelope + e)
            p = tl.load(features + e * 2 * H + H + h, mask=in_h, other=0.0)
            tl.store(weight + e * H + h, tl.exp(a - m) * u * p / t, mask=in_h)


@triton.jit
def weights_backward_kernel(
    dots, weight, pair, features, envelope, scale, row_ptr, top, total, grad_features, grad_pair, grad_envelope,
    grad_scale, H, inverse_root, eps, NORM: tl.constexpr, B: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """From dots[e, b, h] = <v, dL/dA> to the gradients of features, <q, k>, envelope and scale. All heads at once.

    grad_pair[e, h] is dL/d<q, k>.
    """
    i = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    in_h = h < H
    first, last = tl.load(row_ptr + i), tl.load(row_ptr + i + 1)
    dtype = weight.dtype.element_ty
    if NORM <= 1:
        m = tl.load(top + i * H + h, mask=in_h, other=0.0)
        t = tl.load(total + i * H + h, mask=in_h, other=1.0)
        mean = tl.zeros([BH], dtype=dtype)
        best = tl.zeros([BH], dtype=tl.int64) - 1
        for e in range(first, last):
            gw = tl.load(scale + e * B) * tl.load(dots + e * B * H + h, mask=in_h, other=0.0)
            if B == 3:
                gw += tl.load(scale + e * 3 + 1) * tl.load(dots + (e * 3 + 1) * H + h, mask=in_h, other=0.0)
                gw += tl.load(scale + e * 3 + 2) * tl.load(dots + (e * 3 + 2) * H + h, mask=in_h, other=0.0)
            mean += gw * tl.load(weight + e * H + h, mask=in_h, other=0.0)
            if NORM == 1:
                g = tl.load(features + e * 2 * H + h, mask=in_h, other=0.0)
                a = g * tl.load(pair + e * H + h, mask=in_h, other=0.0)
                best = tl.where((best < 0) & (a >= m), e, best)
    for e in range(first, last):
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        y = tl.load(dots + e * B * H + h, mask=in_h, other=0.0)
        gw = tl.load(scale + e * B) * y
        tl.store(grad_scale + e * B, tl.sum(w * y, axis=0))
        if B == 3:
            y = tl.load(dots + (e * 3 + 1) * H + h, mask=in_h, other=0.0)
            gw += tl.load(scale + e * 3 + 1) * y
            tl.store(grad_scale + e * 3 + 1, tl.sum(w * y, axis=0))
            y = tl.load(dots + (e * 3 + 2) * H + h, mask=in_h, other=0.0)
            gw += tl.load(scale + e * 3 + 2) * y
            tl.store(grad_scale + e * 3 + 2, tl.sum(w * y, axis=0))
        g = tl.load(features + e * 2 * H + h, mask=in_h, other=0.0)
        p = tl.load(features + e * 2 * H + H + h, mask=in_h, other=0.0)
        x = tl.load(pair + e * H + h, mask=in_h, other=0.0)
        u = tl.load(envelope + e)
        a = g * x
        if NORM <= 1:
            z = tl.exp(a - m)
            gp = gw * z * u / t
            gz = (gw * p - mean) / t
            ga = gz * z * u
            gu = gz * z
            if NORM == 1:
                ga -= tl.where(best == e, eps / t * mean, 0.0)
        elif NORM == 2:
            z = _softplus(a)
            gp = gw * z * u
            ga = gw * u * p * _sigmoid(a)
            gu = gw * z * p
        else:
            z = _sigmoid(a)
            gp = gw * z * u
            ga = gw * u * p * z * (1.0 - z)
            gu = gw * z * p
        tl.store(grad_features + e * 2 * H + h, ga * x, mask=in_h)
        tl.store(grad_features + e * 2 * H + H + h, gp, mask=in_h)
        tl.store(grad_pair + e * H + h, ga * g * inverse_root, mask=in_h)
        tl.store(grad_envelope + e, tl.sum(tl.where(in_h, gu, 0.0), axis=0))
