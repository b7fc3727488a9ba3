r"""Triton kernels of the multilinear pieces of an attention step.

Layout: a value row of C channels with head c mod H is a [C/H, H] matrix, so the value of an atom is a [R, H] matrix,
R = (lmax+1)^2 C/H, and a head's weight multiplies a column. B directions (3: order 1; 1: a plain weighted sum).

With w [e, H], s [e, B], v [senders, R, H] and g [n, B, R, H] the form is
:math:`F = \sum_e \sum_{b,r,h} w_{eh} s_{eb} v_{j(e) r h} g_{i(e) b r h}`, linear in each of the four. Its four
partial derivatives are all there is: every derivative of every order is a sum of them with other arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aggregate_kernel(
    weight, scale, value, source, row_ptr, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dF/dg: out[i, b, r, h] = sum over edges e of i of w[e, h] s[e, b] v[source(e), r, h]."""
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
        s0 = tl.load(scale + e * B)
        x = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0) * w[None, :]
        a0 += s0 * x
        if B == 3:
            s1 = tl.load(scale + e * B + 1)
            s2 = tl.load(scale + e * B + 2)
            a1 += s1 * x
            a2 += s2 * x
        if RB > 0:
            y = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0) * w[None, :]
            b0 += s0 * y
            if B == 3:
                b1 += s1 * y
                b2 += s2 * y
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
def aggregate_transposed_kernel(
    weight, scale, grad, target, order, order_ptr, senders, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dF/dv: out[j, r, h] = sum over edges e from sender j of w[e, h] sum_b s[e, b] g[target(e), b, r, h].

    ACCUMULATE: add to row senders[j] of ``out`` instead of writing row j.
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
        base = grad + i * B * R * H
        s0 = tl.load(scale + e * B)
        x = s0 * tl.load(base + at_a, mask=mask_a, other=0.0)
        if B == 3:
            s1 = tl.load(scale + e * B + 1)
            s2 = tl.load(scale + e * B + 2)
            x += s1 * tl.load(base + R * H + at_a, mask=mask_a, other=0.0)
            x += s2 * tl.load(base + 2 * R * H + at_a, mask=mask_a, other=0.0)
        acc_a += x * w[None, :]
        if RB > 0:
            y = s0 * tl.load(base + at_b, mask=mask_b, other=0.0)
            if B == 3:
                y += s1 * tl.load(base + R * H + at_b, mask=mask_b, other=0.0)
                y += s2 * tl.load(base + 2 * R * H + at_b, mask=mask_b, other=0.0)
            acc_b += y * w[None, :]
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
def message_dot_kernel(
    value, grad, source, row_ptr, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[e, b, h] = sum_r v[source(e), r, h] g[i(e), b, r, h]: dF/dw and dF/ds before their last small sum."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
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
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        x = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0)
        y0 = tl.sum(x * a0, axis=0)
        if B == 3:
            y1 = tl.sum(x * a1, axis=0)
            y2 = tl.sum(x * a2, axis=0)
        if RB > 0:
            z = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0)
            y0 += tl.sum(z * b0, axis=0)
            if B == 3:
                y1 += tl.sum(z * b1, axis=0)
                y2 += tl.sum(z * b2, axis=0)
        to = out + e * B * H + h
        tl.store(to, y0, mask=in_h)
        if B == 3:
            tl.store(to + H, y1, mask=in_h)
            tl.store(to + 2 * H, y2, mask=in_h)


@triton.jit
def pair_dot_kernel(query, key, source, row_ptr, out, H, S, BH: tl.constexpr, BS: tl.constexpr):
    """out[e, h] = sum_s q[i(e), h, s] k[source(e), h, s]."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    s = tl.arange(0, BS)
    at = h[:, None] * S + s[None, :]
    mask = (h[:, None] < H) & (s[None, :] < S)
    q = tl.load(query + i * H * S + at, mask=mask, other=0.0)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        k = tl.load(key + j * H * S + at, mask=mask, other=0.0)
        tl.store(out + e * H + h, tl.sum(q * k, axis=1), mask=h < H)


@triton.jit
def pair_sum_kernel(
    weight, x, index, order, ptr, rows, out, H, S,
    BH: tl.constexpr, BS: tl.constexpr, ORDERED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out[n, h, s] = sum over t in ptr[n]..ptr[n+1] of weight[e, h] x[index(e), h, s], e = order[t] (or t).

    ACCUMULATE: add to row rows[n] of ``out`` instead of writing row n.
    """
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    s = tl.arange(0, BS)
    at = h[:, None] * S + s[None, :]
    mask = (h[:, None] < H) & (s[None, :] < S)
    total = tl.zeros([BH, BS], dtype=out.dtype.element_ty)
    for t in range(tl.load(ptr + n), tl.load(ptr + n + 1)):
        e = t
        if ORDERED:
            e = tl.load(order + t).to(tl.int64)
        i = tl.load(index + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=h < H, other=0.0)
        total += w[:, None] * tl.load(x + i * H * S + at, mask=mask, other=0.0)
    row = n
    if ACCUMULATE:
        row = tl.load(rows + n).to(tl.int64)
        total += tl.load(out + row * H * S + at, mask=mask, other=0.0)
    tl.store(out + row * H * S + at, total, mask=mask)


@triton.jit
def contract_kernel(
    matrix, x, out, P, K, C, PP: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr
):
    """out[n, p, c] = sum_k matrix[p, k] x[n, k, c] for a small matrix: the Clebsch-Gordan contraction of one atom."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p, k = tl.arange(0, PP), tl.arange(0, KP)
    a = tl.load(matrix + p[:, None] * K + k[None, :], mask=(p[:, None] < P) & (k[None, :] < K), other=0.0)
    inside = c[None, :] < C
    b = tl.load(x + n * K * C + k[:, None] * C + c[None, :], mask=(k[:, None] < K) & inside, other=0.0)
    y = tl.dot(a, b.to(a.dtype), input_precision=PRECISION, out_dtype=a.dtype).to(out.dtype.element_ty)
    tl.store(out + n * P * C + p[:, None] * C + c[None, :], y, mask=(p[:, None] < P) & inside)


@triton.jit
def contract_rows_kernel(
    matrix, x, out, out_factor, P, K, C, PP: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr
):
    """The result of contract_kernel as float16 rows with their factor (common/half.py); a program has all channels."""
    n = tl.program_id(0).to(tl.int64)
    c, p, k = tl.arange(0, BC), tl.arange(0, PP), tl.arange(0, KP)
    a = tl.load(matrix + p[:, None] * K + k[None, :], mask=(p[:, None] < P) & (k[None, :] < K), other=0.0)
    b = tl.load(x + n * K * C + k[:, None] * C + c[None, :], mask=(k[:, None] < K) & (c[None, :] < C), other=0.0)
    y = tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)
    top = tl.max(tl.abs(y))
    top = tl.where(top > 0.0, top, 1.0)
    inside = (p[:, None] < P) & (c[None, :] < C)
    tl.store(out + n * P * C + p[:, None] * C + c[None, :], (y / top).to(tl.float16), mask=inside)
    tl.store(out_factor + n, top)
