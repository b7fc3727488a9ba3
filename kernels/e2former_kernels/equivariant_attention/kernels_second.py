r"""Triton kernels of the attention weights along a change of everything they read, and of the gradient of both.

a = g x with x = <q, k> / sqrt(S). How weights w change with it, and NORM, SOFTMAX and MAXIMUM: ``attention_norm.py``.

Triton kernels of the sum of messages along a change of weights, scales and values, and of its gradients.

:math:`F = \sum_e \sum_{b,r,h} w_{eh} s_{eb} v_{j(e) r h} g_{i(e) b r h}`, in the layout of ``kernels_value.py``.
With ' for the change, the aggregate sum_e w s v changes by sum_e (w' s + w s') v + w s v'. A kernel gathers a row once,
for all of its terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.equivariant_attention.attention_norm import (
    activation_second,
    activation_tangent,
    add_to_sum_tangent,
    drift_of,
    shift_of_none,
    softmax_second,
    softmax_tangent,
    with_constant,
)
from e2former_kernels.equivariant_attention.kernels_value import (
    add_each,
    add_scaled,
    dots,
    load_rows,
    load_scale,
    no_rows,
    places,
    places_of_heads,
    store_rows,
    weighted,
)


@triton.jit
def weights_tangent_kernel(
    query, query_dot, key, key_dot, features, features_dot, envelope, envelope_dot, source, row_ptr, pair, pair_dot,
    weight, weight_dot, top, total, drift, top_dot, best, H, S, inverse_root, constant,
    NORM: tl.constexpr, SOFTMAX: tl.constexpr, MAXIMUM: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """w and w' of the edges of one receiver. One program: one receiver, BH heads.

    pair, pair_dot: x and x', [E, H]. Softmax only, [n, H]: top m, total T, drift sigma; top_dot m' and best, the edge
    that m is taken from (MAXIMUM). Long: softmax needs a second loop over the same edges.
    """
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    at, mask = places_of_heads(h, in_h, S, BS)
    first, last = tl.load(row_ptr + i), tl.load(row_ptr + i + 1)
    q = tl.load(query + i * H * S + at, mask=mask, other=0.0)
    q_dot = tl.load(query_dot + i * H * S + at, mask=mask, other=0.0)
    m_dot = tl.zeros([BH], dtype=weight.dtype.element_ty)
    t = m_dot
    t_dot = m_dot
    top_edge = tl.zeros([BH], dtype=tl.int64) - 1
    m = shift_of_none(BH, weight.dtype.element_ty, MAXIMUM)
    for e in range(first, last):
        j = tl.load(source + e).to(tl.int64)
        k = tl.load(key + j * H * S + at, mask=mask, other=0.0)
        k_dot = tl.load(key_dot + j * H * S + at, mask=mask, other=0.0)
        x = tl.sum(q * k, axis=1) * inverse_root
        x_dot = tl.sum(q_dot * k + q * k_dot, axis=1) * inverse_root
        tl.store(pair + e * H + h, x, mask=in_h)
        tl.store(pair_dot + e * H + h, x_dot, mask=in_h)
        g = tl.load(features + e * 2 * H + h, mask=in_h, other=0.0)
        a = g * x
        a_dot = g * x_dot + x * tl.load(features_dot + e * 2 * H + h, mask=in_h, other=0.0)
        u = tl.load(envelope + e)
        u_dot = tl.load(envelope_dot + e)
        if SOFTMAX:
            m, m_dot, t, t_dot, top_edge = add_to_sum_tangent(
                m, m_dot, t, t_dot, top_edge, a, a_dot, u, u_dot, e, MAXIMUM
            )
            tl.store(weight + e * H + h, a, mask=in_h)
            tl.store(weight_dot + e * H + h, a_dot, mask=in_h)
        else:
            p = tl.load(features + e * 2 * H + H + h, mask=in_h, other=0.0)
            p_dot = tl.load(features_dot + e * 2 * H + H + h, mask=in_h, other=0.0)
            w, w_dot = activation_tangent(a, a_dot, u, u_dot, p, p_dot, NORM)
            tl.store(weight + e * H + h, w, mask=in_h)
            tl.store(weight_dot + e * H + h, w_dot, mask=in_h)
    if SOFTMAX:
        t = with_constant(m, t, constant, MAXIMUM)
        sigma = drift_of(m_dot, t, t_dot, constant, MAXIMUM)
        if MAXIMUM:
            tl.store(top_dot + i * H + h, m_dot, mask=in_h)
            tl.store(best + i * H + h, top_edge, mask=in_h)
        tl.store(top + i * H + h, m, mask=in_h)
        tl.store(total + i * H + h, t, mask=in_h)
        tl.store(drift + i * H + h, sigma, mask=in_h)
        tl.debug_barrier()
        for e in range(first, last):
            a = tl.load(weight + e * H + h, mask=in_h, other=0.0)
            a_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0) - m_dot
            u = tl.load(envelope + e)
            p = tl.load(features + e * 2 * H + H + h, mask=in_h, other=0.0)
            p_dot = tl.load(features_dot + e * 2 * H + H + h, mask=in_h, other=0.0)
            u_dot = tl.load(envelope_dot + e)
            w, w_dot = softmax_tangent(a, a_dot, u, u_dot, p, p_dot, m, t, sigma)
            tl.store(weight + e * H + h, w, mask=in_h)
            tl.store(weight_dot + e * H + h, w_dot, mask=in_h)


@triton.jit
def weights_second_kernel(
    grad_weight, grad_weight_dot, pair, pair_dot, features, features_dot, envelope, envelope_dot, target,
    top, total, drift, top_dot, best, sum_dot, sum_both, grad_features, grad_features_dot, grad_envelope,
    grad_envelope_dot, E, H, inverse_root, constant,
    NORM: tl.constexpr, SOFTMAX: tl.constexpr, MAXIMUM: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """From the gradients W, W' by w, w' to those by features, x, envelope and the changes of all of them.

    sum_dot, sum_both: [n, H], sums over the receiver's edges of W' w and of W' w' + W w (softmax only). pair and
    pair_dot are overwritten by the gradients by <q, k> and its change. One program: BE edges, all heads.
    """
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    in_e = e < E
    h = tl.arange(0, BH)
    mask = in_e[:, None] & (h < H)[None, :]
    at = e[:, None] * H + h[None, :]
    gate_at = e[:, None] * (2 * H) + h[None, :]
    gw = tl.load(grad_weight + at, mask=mask, other=0.0)
    gw_dot = tl.load(grad_weight_dot + at, mask=mask, other=0.0)
    x = tl.load(pair + at, mask=mask, other=0.0)
    x_dot = tl.load(pair_dot + at, mask=mask, other=0.0)
    g = tl.load(features + gate_at, mask=mask, other=0.0)
    g_dot = tl.load(features_dot + gate_at, mask=mask, other=0.0)
    p = tl.load(features + gate_at + H, mask=mask, other=0.0)
    p_dot = tl.load(features_dot + gate_at + H, mask=mask, other=0.0)
    u = tl.load(envelope + e, mask=in_e, other=0.0)[:, None]
    u_dot = tl.load(envelope_dot + e, mask=in_e, other=0.0)[:, None]
    a = g * x
    a_dot = g * x_dot + x * g_dot
    if SOFTMAX:
        receiver = tl.load(target + e, mask=in_e, other=0).to(tl.int64)
        row = receiver[:, None] * H + h[None, :]
        t = tl.load(total + row, mask=mask, other=1.0)
        sigma = tl.load(drift + row, mask=mask, other=0.0)
        back = tl.load(sum_dot + row, mask=mask, other=0.0)
        both = tl.load(sum_both + row, mask=mask, other=0.0)
        m = tl.load(top + row, mask=mask, other=0.0)
        change, where = a_dot, -1
        if MAXIMUM:
            change -= tl.load(top_dot + row, mask=mask, other=0.0)
            where = tl.load(best + row, mask=mask, other=-1)
        ga, ga_dot, gu, gu_dot, gp, gp_dot = softmax_second(
            gw, gw_dot, a, change, u, u_dot, p, p_dot, m, t, sigma, back, both, where == e[:, None], constant, MAXIMUM
        )
    else:
        ga, ga_dot, gu, gu_dot, gp, gp_dot = activation_second(gw, gw_dot, a, a_dot, u, u_dot, p, p_dot, NORM)
    tl.store(grad_features + gate_at, ga * x + ga_dot * x_dot, mask=mask)
    tl.store(grad_features_dot + gate_at, ga_dot * x, mask=mask)
    tl.store(grad_features + gate_at + H, gp, mask=mask)
    tl.store(grad_features_dot + gate_at + H, gp_dot, mask=mask)
    tl.store(pair + at, (ga * g + ga_dot * g_dot) * inverse_root, mask=mask)
    tl.store(pair_dot + at, ga_dot * g * inverse_root, mask=mask)
    tl.store(grad_envelope + e, tl.sum(tl.where(mask, gu, 0.0), axis=1), mask=in_e)
    tl.store(grad_envelope_dot + e, tl.sum(tl.where(mask, gu_dot, 0.0), axis=1), mask=in_e)


@triton.jit
def aggregate_tangent_kernel(
    weight, weight_dot, scale, scale_dot, value, value_dot, source, row_ptr, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[i, b, r, h] = sum over edges e of i of (w' s_b + w s_b') v[source(e), r, h] + w s_b v'[source(e), r, h]."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    at_a, mask_a = places(0, RA, R, h, in_h, H)
    dtype = out.dtype.element_ty
    sum_a = no_rows(B, RA, BH, dtype)
    if RB > 0:
        at_b, mask_b = places(RA, RB, R, h, in_h, H)
        sum_b = no_rows(B, RB, BH, dtype)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        w_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        c, c_dot = load_scale(scale, e, B), load_scale(scale_dot, e, B)
        # x: what the scale multiplies; y: what its change multiplies
        y = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0)
        x = y * w_dot[None, :] + tl.load(value_dot + j * R * H + at_a, mask=mask_a, other=0.0) * w[None, :]
        sum_a = add_scaled(add_scaled(sum_a, c, x, B), c_dot, y * w[None, :], B)
        if RB > 0:
            y = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0)
            x = y * w_dot[None, :] + tl.load(value_dot + j * R * H + at_b, mask=mask_b, other=0.0) * w[None, :]
            sum_b = add_scaled(add_scaled(sum_b, c, x, B), c_dot, y * w[None, :], B)
    base = out + i * B * R * H
    store_rows(base, at_a, mask_a, R * H, sum_a, B)
    if RB > 0:
        store_rows(base, at_b, mask_b, R * H, sum_b, B)


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
    at_a, mask_a = places(0, RA, R, h, in_h, H)
    base = grad + i * B * R * H
    dtype = grad.dtype.element_ty
    grad_a = load_rows(base, at_a, mask_a, R * H, B, True, dtype)
    if RB > 0:
        at_b, mask_b = places(RA, RB, R, h, in_h, H)
        grad_b = load_rows(base, at_b, mask_b, R * H, B, True, dtype)
    dot_sum = tl.zeros([BH], dtype=grad.dtype.element_ty)
    both_sum = dot_sum
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        x = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0)
        y = tl.load(value_dot + j * R * H + at_a, mask=mask_a, other=0.0)
        d, d_dot = dots(x, grad_a, B), dots(y, grad_a, B)
        if RB > 0:
            x = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0)
            y = tl.load(value_dot + j * R * H + at_b, mask=mask_b, other=0.0)
            d, d_dot = add_each(d, dots(x, grad_b, B), B), add_each(d_dot, dots(y, grad_b, B), B)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        w_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        c, c_dot = load_scale(scale, e, B), load_scale(scale_dot, e, B)
        by_dot = weighted(c, d, B)
        by = weighted(c_dot, d, B) + weighted(c, d_dot, B)
        tl.store(grad_weight_dot + e * H + h, by_dot, mask=in_h)
        tl.store(grad_weight + e * H + h, by, mask=in_h)
        dot_sum += by_dot * w
        both_sum += by_dot * w_dot + by * w
        if SCALE:
            to = grad_scale + (tile.to(tl.int64) * E + e) * (2 * B)
            for b in tl.static_range(B):
                tl.store(to + b, tl.sum(w_dot * d[b] + w * d_dot[b], axis=0))
                tl.store(to + B + b, tl.sum(w * d[b], axis=0))
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
    at_a, mask_a = places(0, RA, R, h, in_h, H)
    dtype = out.dtype.element_ty
    acc_a = tl.zeros([RA, BH], dtype=dtype)
    if RB > 0:
        at_b, mask_b = places(RA, RB, R, h, in_h, H)
        acc_b = tl.zeros([RB, BH], dtype=dtype)
    for t in range(tl.load(order_ptr + j), tl.load(order_ptr + j + 1)):
        e = tl.load(order + t).to(tl.int64)
        i = tl.load(target + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        w_dot = tl.load(weight_dot + e * H + h, mask=in_h, other=0.0)
        base = grad + i * B * R * H
        for b in tl.static_range(B):
            c = tl.load(scale + e * B + b) * w_dot + tl.load(scale_dot + e * B + b) * w
            acc_a += c[None, :] * tl.load(base + b * R * H + at_a, mask=mask_a, other=0.0)
            if RB > 0:
                acc_b += c[None, :] * tl.load(base + b * R * H + at_b, mask=mask_b, other=0.0)
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

    ORDERED: e = order[t], else t. ACCUMULATE: added to row rows[n] of ``out`` instead of writing row n.
    """
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    at, mask = places_of_heads(h, in_h, S, BS)
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
