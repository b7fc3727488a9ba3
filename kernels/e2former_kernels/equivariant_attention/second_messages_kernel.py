r"""Triton kernels of the sum of messages along a change of weights, scales and values, and of its gradients.

:math:`F = \sum_e \sum_{b,r,h} w_{eh} s_{eb} v_{j(e) r h} g_{i(e) b r h}` as in ``kernel.py``. With ' for the change,
the aggregate sum_e w s v changes by sum_e (w' s + w s') v + w s v'. A kernel gathers a row once, for all of its terms.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aggregate_tangent_kernel(
    weight, weight_dot, scale, scale_dot, value, value_dot, source, row_ptr, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[i, b, r, h] = sum over edges e of i of (w' s_b + w s_b') v[source(e), r, h] + w s_b v'[source(e), r, h]."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    ra = tl.arange(0, RA)
    at_a = ra[:, None] * H + h[None, :]
    mask_a = (ra[:, None] < R) & in_h[None, :]
    dtype = out.dtype.element_ty
    a0 = tl.zeros([RA, BH], dtype=dtype)
    if B == 3:
        a1 = tl.zeros([RA, BH], dtype=dtype)
        a2 = tl.zeros([RA, BH], dtype=dtype)
    if RB > 0:
        rb = RA + tl.arange(0, RB)
        at_b = rb[:, None] * H + h[None, :]
        mask_b = (rb[:, None] < R) & in_h[None, :]
        b0 = tl.zeros([RB, BH], dtype=dtype)
        if B == 3:
            b1 = tl.zeros([RB, BH], dtype=dtype)
            b2 = tl.zeros([RB, BH], dtype=dtype)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        w_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        s0 = tl.load(scale + e * B)
        t0 = tl.load(scale_dot + e * B)
        if B == 3:
            s1 = tl.load(scale + e * B + 1)
            s2 = tl.load(scale + e * B + 2)
            t1 = tl.load(scale_dot + e * B + 1)
            t2 = tl.load(scale_dot + e * B + 2)
        # x: what s multiplies; y: what s' multiplies
        y = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0)
        x = y * w_dot[None, :] + tl.load(value_dot + j * R * H + at_a, mask=mask_a, other=0.0) * w[None, :]
        y = y * w[None, :]
        a0 += s0 * x + t0 * y
        if B == 3:
            a1 += s1 * x + t1 * y
            a2 += s2 * x + t2 * y
        if RB > 0:
            y = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0)
            x = y * w_dot[None, :] + tl.load(value_dot + j * R * H + at_b, mask=mask_b, other=0.0) * w[None, :]
            y = y * w[None, :]
            b0 += s0 * x + t0 * y
            if B == 3:
                b1 += s1 * x + t1 * y
                b2 += s2 * x + t2 * y
    base = out + i * B * R * H
    tl.store(base + at_a, a0, mask=mask_a)
    if B == 3:
        tl.store(base + R * H + at_a, a1, mask=mask_a)
        tl.store(base + 2 * R * H + at_a, a2, mask=mask_a)
    if RB > 0:
        tl.store(base + at_b, b0, mask=mask_b)
        if B == 3:
            tl.store(base + R * H + at_b, b1, mask=mask_b)
            tl.store(base + 2 * R * H + at_b, b2, mask=mask_b)


@triton.jit
def message_second_kernel(
    value, value_dot, grad, weight, weight_dot, scale, scale_dot, source, row_ptr,
    grad_weight, grad_weight_dot, grad_scale, sum_dot, sum_both, E, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of <g, aggregate_tangent_kernel> by weight, weight_dot [E, H], scale and scale_dot.

    With D_b = <v, g_b>, D_b' = <v', g_b> of every edge and head: by w' sum_b s_b D_b; by w sum_b s_b' D_b + s_b D_b';
    by s_b' sum_h w D_b; by s_b sum_h w' D_b + w D_b'. The last two go to grad_scale [tiles of heads, E, 2 B] (s, then
    s'), of which the heads of a tile are the sum (SCALE). sum_dot, sum_both: [n, H], sums over the receiver's edges of
    (by w') w, and of (by w') w' + (by w) w.
    """
    i = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    h = tile * BH + tl.arange(0, BH)
    in_h = h < H
    ra = tl.arange(0, RA)
    at_a = ra[:, None] * H + h[None, :]
    mask_a = (ra[:, None] < R) & in_h[None, :]
    base = grad + i * B * R * H
    a0 = tl.load(base + at_a, mask=mask_a, other=0.0)
    if B == 3:
        a1 = tl.load(base + R * H + at_a, mask=mask_a, other=0.0)
        a2 = tl.load(base + 2 * R * H + at_a, mask=mask_a, other=0.0)
    if RB > 0:
        rb = RA + tl.arange(0, RB)
        at_b = rb[:, None] * H + h[None, :]
        mask_b = (rb[:, None] < R) & in_h[None, :]
        b0 = tl.load(base + at_b, mask=mask_b, other=0.0)
        if B == 3:
            b1 = tl.load(base + R * H + at_b, mask=mask_b, other=0.0)
            b2 = tl.load(base + 2 * R * H + at_b, mask=mask_b, other=0.0)
    dot_sum = tl.zeros([BH], dtype=grad.dtype.element_ty)
    both_sum = dot_sum
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        x = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0)
        y = tl.load(value_dot + j * R * H + at_a, mask=mask_a, other=0.0)
        d0 = tl.sum(x * a0, axis=0)
        f0 = tl.sum(y * a0, axis=0)
        if B == 3:
            d1 = tl.sum(x * a1, axis=0)
            d2 = tl.sum(x * a2, axis=0)
            f1 = tl.sum(y * a1, axis=0)
            f2 = tl.sum(y * a2, axis=0)
        if RB > 0:
            x = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0)
            y = tl.load(value_dot + j * R * H + at_b, mask=mask_b, other=0.0)
            d0 += tl.sum(x * b0, axis=0)
            f0 += tl.sum(y * b0, axis=0)
            if B == 3:
                d1 += tl.sum(x * b1, axis=0)
                d2 += tl.sum(x * b2, axis=0)
                f1 += tl.sum(y * b1, axis=0)
                f2 += tl.sum(y * b2, axis=0)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        w_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        s0 = tl.load(scale + e * B)
        by_dot = s0 * d0
        by = tl.load(scale_dot + e * B) * d0 + s0 * f0
        if B == 3:
            s1 = tl.load(scale + e * B + 1)
            s2 = tl.load(scale + e * B + 2)
            by_dot += s1 * d1 + s2 * d2
            by += tl.load(scale_dot + e * B + 1) * d1 + s1 * f1
            by += tl.load(scale_dot + e * B + 2) * d2 + s2 * f2
        tl.store(grad_weight_dot + e * H + h, by_dot, mask=in_h)
        tl.store(grad_weight + e * H + h, by, mask=in_h)
        dot_sum += by_dot * w
        both_sum += by_dot * w_dot + by * w
        if SCALE:
            to = grad_scale + (tile.to(tl.int64) * E + e) * (2 * B)
            tl.store(to, tl.sum(w_dot * d0 + w * f0, axis=0))
            tl.store(to + B, tl.sum(w * d0, axis=0))
            if B == 3:
                tl.store(to + 1, tl.sum(w_dot * d1 + w * f1, axis=0))
                tl.store(to + 2, tl.sum(w_dot * d2 + w * f2, axis=0))
                tl.store(to + 4, tl.sum(w * d1, axis=0))
                tl.store(to + 5, tl.sum(w * d2, axis=0))
    tl.store(sum_dot + i * H + h, dot_sum, mask=in_h)
    tl.store(sum_both + i * H + h, both_sum, mask=in_h)


@triton.jit
def aggregate_transposed_second_kernel(
    weight, weight_dot, scale, scale_dot, grad, target, order, order_ptr, senders, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Gradient of <g, aggregate_tangent_kernel> by value.

    out[j, r, h] = sum over edges e from sender j of sum_b (w' s_b + w s_b') g[target(e), b, r, h]. ACCUMULATE: add to
    row senders[j] of ``out`` instead of writing row j.
    """
    j = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    ra = tl.arange(0, RA)
    at_a = ra[:, None] * H + h[None, :]
    mask_a = (ra[:, None] < R) & in_h[None, :]
    dtype = out.dtype.element_ty
    acc_a = tl.zeros([RA, BH], dtype=dtype)
    if RB > 0:
        rb = RA + tl.arange(0, RB)
        at_b = rb[:, None] * H + h[None, :]
        mask_b = (rb[:, None] < R) & in_h[None, :]
        acc_b = tl.zeros([RB, BH], dtype=dtype)
    for t in range(tl.load(order_ptr + j), tl.load(order_ptr + j + 1)):
        e = tl.load(order + t).to(tl.int64)
        i = tl.load(target + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        w_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        base = grad + i * B * R * H
        c0 = tl.load(scale + e * B) * w_dot + tl.load(scale_dot + e * B) * w
        acc_a += c0[None, :] * tl.load(base + at_a, mask=mask_a, other=0.0)
        if B == 3:
            c1 = tl.load(scale + e * B + 1) * w_dot + tl.load(scale_dot + e * B + 1) * w
            c2 = tl.load(scale + e * B + 2) * w_dot + tl.load(scale_dot + e * B + 2) * w
            acc_a += c1[None, :] * tl.load(base + R * H + at_a, mask=mask_a, other=0.0)
            acc_a += c2[None, :] * tl.load(base + 2 * R * H + at_a, mask=mask_a, other=0.0)
        if RB > 0:
            acc_b += c0[None, :] * tl.load(base + at_b, mask=mask_b, other=0.0)
            if B == 3:
                acc_b += c1[None, :] * tl.load(base + R * H + at_b, mask=mask_b, other=0.0)
                acc_b += c2[None, :] * tl.load(base + 2 * R * H + at_b, mask=mask_b, other=0.0)
    row = j
    if ACCUMULATE:
        row = tl.load(senders + j).to(tl.int64)
        acc_a += tl.load(out + row * R * H + at_a, mask=mask_a, other=0.0)
        if RB > 0:
            acc_b += tl.load(out + row * R * H + at_b, mask=mask_b, other=0.0)
    tl.store(out + row * R * H + at_a, acc_a, mask=mask_a)
    if RB > 0:
        tl.store(out + row * R * H + at_b, acc_b, mask=mask_b)


@triton.jit
def pair_sum_second_kernel(
    weight, x, weight_dot, x_dot, index, order, ptr, rows, out, H, S,
    BH: tl.constexpr, BS: tl.constexpr, ORDERED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out[n, h, s] = sum over t in ptr[n]..ptr[n+1] of weight[e, h] x[index(e), h, s] + weight_dot[e, h] x_dot[...].

    Edges e and ACCUMULATE as in ``kernel.pair_sum_kernel``.
    """
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    s = tl.arange(0, BS)
    at = h[:, None] * S + s[None, :]
    in_h = h < H
    mask = in_h[:, None] & (s[None, :] < S)
    total = tl.zeros([BH, BS], dtype=out.dtype.element_ty)
    for t in range(tl.load(ptr + n), tl.load(ptr + n + 1)):
        e = t
        if ORDERED:
            e = tl.load(order + t).to(tl.int64)
        i = tl.load(index + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        total += w[:, None] * tl.load(x + i * H * S + at, mask=mask, other=0.0)
        w = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        total += w[:, None] * tl.load(x_dot + i * H * S + at, mask=mask, other=0.0)
    row = n
    if ACCUMULATE:
        row = tl.load(rows + n).to(tl.int64)
        total += tl.load(out + row * H * S + at, mask=mask, other=0.0)
    tl.store(out + row * H * S + at, total, mask=mask)
