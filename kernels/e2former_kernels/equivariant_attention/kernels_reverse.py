"""Triton kernels of the attention's first derivative, layout and names as in ``kernels_value.py``.

Three passes over the edges: by receiver for the gradients by the weights, by receiver once more for those by what the
weights are made of (the softmax's mean must be known), and by sender for those by value and key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.equivariant_attention.attention_norm import share, weight_reverse
from e2former_kernels.equivariant_attention.kernels_value import (
    add_each,
    dots,
    load_rows,
    load_scale,
    places,
    places_of_heads,
    weighted,
)
from e2former_kernels.radial.splines import feature, load, spline_and_slope


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def attend_backward_kernel(
    query, query_factor, key, key_factor, features, row, position, envelope, scale, value, value_factor, grad,
    grad_factor, source, row_ptr, top, total, pair, slope, mean, best, grad_scale, E, inverse_root,
    R: tl.constexpr, H: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr, SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr, SPLINE: tl.constexpr, HALF: tl.constexpr, B: tl.constexpr, RA: tl.constexpr,
    RB: tl.constexpr, BH: tl.constexpr, EACH: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Gradients of one receiver's edges by their weights, from grad = dL/dout, [n, B, R, H].

    Writes pair[e, h] = <q, k> / sqrt(S); slope[e, h] = dL/dw; mean[n, h] = sum of slope w; with MAXIMUM best[n, h], the
    edge of the largest score; and this program's part of the sums over heads by the message scale, grad_scale
    [B, programs, E]. The rows of the next edge are on their way while one is worked on: a compiler moves no load over
    a store. Long: an edge's weight and its gradients share one load of its rows.
    """
    MASKED: tl.constexpr = H % BH != 0
    MASKED_B: tl.constexpr = MASKED or RA + RB != R
    i = tl.program_id(0).to(tl.int64)
    h = tl.max_contiguous(tl.program_id(1) * BH + tl.arange(0, BH), EACH)
    in_h = h < H
    first, last = tl.load(row_ptr + i), tl.load(row_ptr + i + 1)
    dtype = slope.dtype.element_ty
    stride = E.to(tl.int64)
    plane = stride * tl.num_programs(1)
    parts = grad_scale + tl.program_id(1) * stride
    at_s, mask_s = places_of_heads(h, in_h, S, BS)
    MASKED_S: tl.constexpr = MASKED or BS != S
    q = tl.load(query + i * (H * S) + at_s, mask=mask_s, other=0.0).to(dtype)
    if HALF:
        inverse_root *= tl.load(query_factor + i)
    at_a, mask_a = places(0, RA, R, h, in_h, H)
    base = grad + i * (B * R * H)
    grad_a = load_rows(base, at_a, mask_a, R * H, B, MASKED, dtype)
    if RB > 0:
        at_b, mask_b = places(RA, RB, R, h, in_h, H)
        grad_b = load_rows(base, at_b, mask_b, R * H, B, MASKED_B, dtype)
    m, inv = 0.0, 1.0
    if SOFTMAX:
        m = load(top + i * H + h, in_h, MASKED)
        inv = 1.0 / tl.load(total + i * H + h, mask=in_h, other=1.0)
    received = 1.0
    if HALF:
        received = tl.load(grad_factor + i)
    summed = tl.zeros([BH], dtype=dtype)
    if MAXIMUM:  # the first edge that attains the maximum; compared with each other, rounded alike
        highest = summed - float("inf")
        where = tl.zeros([BH], dtype=tl.int64) - 1
    end = stride - 1  # what is read ahead behind the last edge of a receiver is not used
    j = tl.load(source + tl.minimum(first, end)).to(tl.int64)
    x_next = load(value + j * (R * H) + at_a, mask_a, MASKED)
    if RB > 0:
        z_next = load(value + j * (R * H) + at_b, mask_b, MASKED_B)
    k_next = load(key + j * (H * S) + at_s, mask_s, MASKED_S)
    if HALF:
        of_key, of_value = tl.load(key_factor + j), tl.load(value_factor + j)
    j = tl.load(source + tl.minimum(first + 1, end)).to(tl.int64)
    for e in range(first, last):
        g = feature(features, row, position, e, h, in_h, 2 * H, SPLINE, MASKED)
        p = feature(features, row, position, e, H + h, in_h, 2 * H, SPLINE, MASKED)
        u = tl.load(envelope + e)
        c = load_scale(scale, e, B)
        x = x_next.to(dtype)
        if RB > 0:
            z = z_next.to(dtype)
        k = k_next.to(dtype)
        dot = tl.sum(q * k, axis=1) * inverse_root
        if HALF:
            dot *= of_key
            both = received * of_value
        v = value + j * (R * H)
        x_next = load(v + at_a, mask_a, MASKED)
        if RB > 0:
            z_next = load(v + at_b, mask_b, MASKED_B)
        k_next = load(key + j * (H * S) + at_s, mask_s, MASKED_S)
        if HALF:
            of_key, of_value = tl.load(key_factor + j), tl.load(value_factor + j)
        j = tl.load(source + tl.minimum(e + 2, end)).to(tl.int64)
        tl.store(pair + e * H + h, dot, mask=in_h)
        a = g * dot
        w = share(a, m, inv, NORM, SOFTMAX) * u * p
        if MAXIMUM:
            where = tl.where(a > highest, e, where)
            highest = tl.maximum(a, highest)
        y = dots(x, grad_a, B)
        if RB > 0:
            y = add_each(y, dots(z, grad_b, B), B)
        gw = tl.zeros([BH], dtype=dtype)
        for b in tl.static_range(B):
            by = y[b]
            if HALF:
                by *= both
            gw += c[b] * by
            tl.store(parts + b * plane + e, tl.sum(w * by, axis=0))
        summed += gw * w
        tl.store(slope + e * H + h, gw, mask=in_h)
    if SOFTMAX:
        tl.store(mean + i * H + h, summed, mask=in_h)
    if MAXIMUM:
        tl.store(best + i * H + h, where, mask=in_h)


@triton.jit(do_not_specialize=["E"])
def score_backward_kernel(
    key, key_factor, features, row, position, envelope, source, row_ptr, top, total, mean, best, pair, weight,
    grad_features, grad_parts, grad_query, E, inverse_root, constant, knots_per_length,
    H: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr, SOFTMAX: tl.constexpr, MAXIMUM: tl.constexpr,
    SPLINE: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, EACH: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """From the gradients by the weights of one receiver's edges, in ``weight``, those by what the weights are made of.

    Replaces pair by dL/d<q, k> and weight by w, [e, h]; writes grad_query [n, H, S], grad_features [E, 2H] (without
    SPLINE), and this program's part of the sums over heads, grad_parts [1 (+ 1), programs, E]: by the envelope and
    (with SPLINE) the length. Edges are taken BE at a time. Long: all scores share what is loaded and stored.
    """
    i = tl.program_id(0).to(tl.int64)
    h = tl.max_contiguous(tl.program_id(1) * BH + tl.arange(0, BH), EACH)
    in_h = h < H
    at_s, mask_s = places_of_heads(h, in_h, S, BS)
    first, last = tl.load(row_ptr + i), tl.load(row_ptr + i + 1)
    dtype = weight.dtype.element_ty
    stride = E.to(tl.int64)
    parts = grad_parts + tl.program_id(1) * stride
    m, inv, summed, where = 0.0, 1.0, 0.0, -1
    if SOFTMAX:
        m = tl.load(top + i * H + h, mask=in_h, other=0.0)[None, :]
        inv = 1.0 / tl.load(total + i * H + h, mask=in_h, other=1.0)[None, :]
        summed = tl.load(mean + i * H + h, mask=in_h, other=0.0)[None, :]
    if MAXIMUM:
        where = tl.load(best + i * H + h, mask=in_h, other=-1)[None, :]
    grad_q = tl.zeros([BH, BS], dtype=dtype)
    for begin in range(first, last, BE):
        e = begin + tl.arange(0, BE)
        here = e < last
        j = tl.load(source + e, mask=here, other=0).to(tl.int64)
        inside = here[:, None] & in_h[None, :]
        at = e[:, None] * H + h[None, :]
        k = tl.load(
            key + j[:, None, None] * (H * S) + at_s[None, :, :], mask=here[:, None, None] & mask_s[None, :, :],
            other=0.0,
        )  # fmt: skip
        gw = tl.load(weight + at, mask=inside, other=0.0)
        x = tl.load(pair + at, mask=inside, other=0.0)
        if SPLINE:
            rows = tl.load(row + e, mask=here, other=0).to(tl.int64)[:, None]
            f = tl.load(position + e, mask=here, other=0.0)[:, None]
            g, dg = spline_and_slope(features, rows, f, h[None, :], inside, knots_per_length, 2 * H, True)
            p, dp = spline_and_slope(features, rows, f, H + h[None, :], inside, knots_per_length, 2 * H, True)
        else:
            g = tl.load(features + e[:, None] * (2 * H) + h[None, :], mask=inside, other=0.0)
            p = tl.load(features + e[:, None] * (2 * H) + H + h[None, :], mask=inside, other=0.0)
        u = tl.load(envelope + e, mask=here, other=0.0)[:, None]
        a = g * x
        w, ga, gu, gp = weight_reverse(
            gw, a, u, p, m, inv, summed, where == e[:, None], constant, NORM, SOFTMAX, MAXIMUM
        )
        gx = ga * g * inverse_root
        tl.store(weight + at, w, mask=inside)
        tl.store(pair + at, gx, mask=inside)
        tl.store(parts + e, tl.sum(tl.where(inside, gu, 0.0), axis=1), mask=here)
        if SPLINE:
            by_length = tl.sum(tl.where(inside, ga * x * dg + gp * dp, 0.0), axis=1)
            tl.store(parts + stride * tl.num_programs(1) + e, by_length, mask=here)
        else:
            tl.store(grad_features + e[:, None] * (2 * H) + h[None, :], ga * x, mask=inside)
            tl.store(grad_features + e[:, None] * (2 * H) + H + h[None, :], gp, mask=inside)
        if HALF:
            gx *= tl.load(key_factor + j, mask=here, other=0.0)[:, None]
        grad_q += tl.sum(tl.where(inside, gx, 0.0)[:, :, None] * k.to(dtype), axis=0)
    tl.store(grad_query + i * (H * S) + at_s, grad_q, mask=mask_s)


@triton.jit
def sender_kernel(
    weight, pair, scale, grad, grad_factor, query, query_factor, target, order, order_ptr, senders,
    grad_value, grad_key, R: tl.constexpr, H: tl.constexpr, S: tl.constexpr, B: tl.constexpr, HALF: tl.constexpr,
    RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr, EACH: tl.constexpr, BS: tl.constexpr,
    ACCUMULATE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients by value and key of one sender: sums over its edges, which ``order`` and ``order_ptr`` list.

    grad_value[j, r, h] = sum of w[e, h] sum_b scale[e, b] grad[target(e), b, r, h];
    grad_key[j, h, s] = sum of pair[e, h] query[target(e), h, s]. ACCUMULATE: added to row senders[j] of both.
    """
    MASKED: tl.constexpr = H % BH != 0
    MASKED_B: tl.constexpr = MASKED or RA + RB != R
    MASKED_S: tl.constexpr = MASKED or BS != S
    j = tl.program_id(0).to(tl.int64)
    h = tl.max_contiguous(tl.program_id(1) * BH + tl.arange(0, BH), EACH)
    in_h = h < H
    at_s, mask_s = places_of_heads(h, in_h, S, BS)
    at_a, mask_a = places(0, RA, R, h, in_h, H)
    dtype = grad_value.dtype.element_ty
    acc_a = tl.zeros([RA, BH], dtype=dtype)
    acc_k = tl.zeros([BH, BS], dtype=dtype)
    if RB > 0:
        at_b, mask_b = places(RA, RB, R, h, in_h, H)
        acc_b = tl.zeros([RB, BH], dtype=dtype)
    for t in tl.range(tl.load(order_ptr + j), tl.load(order_ptr + j + 1), loop_unroll_factor=UNROLL):
        e = tl.load(order + t).to(tl.int64)
        i = tl.load(target + e).to(tl.int64)
        base = grad + i * (B * R * H)
        w = load(weight + e * H + h, in_h, MASKED)
        if HALF:
            w *= tl.load(grad_factor + i)
        c = load_scale(scale, e, B)
        x = load_rows(base, at_a, mask_a, R * H, B, MASKED, dtype)
        acc_a += weighted(c, x, B) * w[None, :]
        if RB > 0:
            y = load_rows(base, at_b, mask_b, R * H, B, MASKED_B, dtype)
            acc_b += weighted(c, y, B) * w[None, :]
        gx = load(pair + e * H + h, in_h, MASKED)
        if HALF:
            gx *= tl.load(query_factor + i)
        acc_k += gx[:, None] * load(query + i * (H * S) + at_s, mask_s, MASKED_S).to(dtype)
    to = j
    if ACCUMULATE:
        to = tl.load(senders + j).to(tl.int64)
        acc_a += tl.load(grad_value + to * (R * H) + at_a, mask=mask_a, other=0.0)
        acc_k += tl.load(grad_key + to * (H * S) + at_s, mask=mask_s, other=0.0)
        if RB > 0:
            acc_b += tl.load(grad_value + to * (R * H) + at_b, mask=mask_b, other=0.0)
    tl.store(grad_value + to * (R * H) + at_a, acc_a, mask=mask_a)
    tl.store(grad_key + to * (H * S) + at_s, acc_k, mask=mask_s)
    if RB > 0:
        tl.store(grad_value + to * (R * H) + at_b, acc_b, mask=mask_b)
