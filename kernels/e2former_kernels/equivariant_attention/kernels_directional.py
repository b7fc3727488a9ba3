"""Triton kernels of the directional scores: harmonics of the edges, their contraction with the receiver's rows, and
both with a change along given directions; value and reverse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.harmonics import (
    add_slopes,
    load_vector,
    next_order,
    next_order_dot,
    next_order_slopes,
    next_order_slopes_dot,
    store_vector,
    vector_dot,
    vector_of,
)
from e2former_kernels.equivariant_attention.message import total_of


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def harmonics_kernel(
    vec, vec_dot, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, TANGENT: tl.constexpr, BLOCK: tl.constexpr
):
    """out [E, M]: Y, or with TANGENT [2, E, M]: Y and its change along vec_dot.

    scales: [L+1, L+1], the factor of each degree and order.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, UNIT)
    r2 = x * x + y * y + z * z
    M: tl.constexpr = (L + 1) * (L + 1)
    to = out + e * M
    zero = 0.0 * x
    c, s, top = zero + 1.0, zero, zero + 1.0
    if TANGENT:
        x_dot, y_dot, z_dot, _ = vector_dot(vec_dot, e, inside, x, y, z, d, UNIT)
        r2_dot = 2.0 * (x * x_dot + y * y_dot + z * z_dot)
        to_dot = to + E.to(tl.int64) * M
        c_dot, s_dot = zero, zero
    for m in tl.static_range(L + 1):
        before, before_dot, p, p_dot = zero, zero, top, zero
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                if TANGENT:
                    after_dot = (2 * l - 1) * (y_dot * p + y * p_dot)
                    after_dot = (after_dot - (l + m - 1) * (r2_dot * before + r2 * before_dot)) / (l - m)
                    before_dot, p_dot = p_dot, after_dot
                before, p = p, after
            scale = tl.load(scales + l * (L + 1) + m)
            tl.store(to + l * l + l + m, scale * p * c, mask=inside)
            if m > 0:
                tl.store(to + l * l + l - m, scale * p * s, mask=inside)
            if TANGENT:
                tl.store(to_dot + l * l + l + m, scale * (p_dot * c + p * c_dot), mask=inside)
                if m > 0:
                    tl.store(to_dot + l * l + l - m, scale * (p_dot * s + p * s_dot), mask=inside)
        top = top * (2 * m + 1)
        if TANGENT:
            c_dot, s_dot = next_order_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot)
        c, s = next_order(c, s, x, z)


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def harmonics_backward_kernel(
    grad, vec, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """out [E, 3] += gradient of harmonics_kernel by vec. grad: [S, E, M], in S parts that are added up here."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, UNIT)
    r2 = x * x + y * y + z * z
    M: tl.constexpr = (L + 1) * (L + 1)
    stride = E.to(tl.int64) * M
    at = grad + e * M
    c = 0.0 * x + 1.0
    s = 0.0 * x
    # derivatives of c and s by x and z; p depends on y and r2
    cx, cz, sx, sz = s, s, s, s
    gx, gy, gz, by_r2 = s, s, s, s
    top = c
    for m in tl.static_range(L + 1):
        before, before_y, before_r = 0.0 * x, 0.0 * x, 0.0 * x
        p, py, pr = top, 0.0 * x, 0.0 * x
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                after_y = ((2 * l - 1) * (p + y * py) - (l + m - 1) * r2 * before_y) / (l - m)
                after_r = ((2 * l - 1) * y * pr - (l + m - 1) * (before + r2 * before_r)) / (l - m)
                before, before_y, before_r = p, py, pr
                p, py, pr = after, after_y, after_r
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * total_of(at + l * l + l + m, stride, inside, S)
            gx, gy, gz, by_r2 = add_slopes(gx, gy, gz, by_r2, g, p, py, pr, c, cx, cz)
            if m > 0:
                g = scale * total_of(at + l * l + l - m, stride, inside, S)
                gx, gy, gz, by_r2 = add_slopes(gx, gy, gz, by_r2, g, p, py, pr, s, sx, sz)
        top = top * (2 * m + 1)
        cx, cz, sx, sz = next_order_slopes(c, s, cx, cz, sx, sz, x, z)
        c, s = next_order(c, s, x, z)
    gx += 2.0 * x * by_r2
    gy += 2.0 * y * by_r2
    gz += 2.0 * z * by_r2
    if UNIT:
        along = gx * x + gy * y + gz * z
        gx = (gx - along * x) / d
        gy = (gy - along * y) / d
        gz = (gz - along * z) / d
    vx, vy, vz = load_vector(out, e, inside, 0.0)
    store_vector(out, e, inside, vx + gx, vy + gy, vz + gz)


@triton.jit
def _columns(D: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Degree, block of columns, columns d within the degree, and those of them that there are and that count."""
    BLOCKS: tl.constexpr = (D + BK - 1) // BK
    l = tl.program_id(1) // BLOCKS
    block = tl.program_id(1) % BLOCKS
    d = block * BK + tl.arange(0, BK)
    return l, block, d, d < D, (d < D) & (l * D + d < K)


@triton.jit
def _rows_of_degree(M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Receiver, block, columns k of x, rows m of their degree, and where its matrix [m, d] stands in [n, M, D]."""
    i = tl.program_id(0).to(tl.int64)
    l, block, d, in_d, in_k = _columns(D, K, BK)
    m = tl.arange(0, BM)
    in_m = m < 2 * l + 1
    m += l * l
    at = i * (M * D) + m[:, None] * D + d[None, :]
    return i, block, l * D + d, in_k, m, in_m, at, in_m[:, None] & in_d[None, :]


@triton.jit(do_not_specialize=["E"])
def directional_kernel(
    harmonics, dot, dot_dot, factor, row_ptr, out, E,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """out[e, k] = x = factor[e, k] sum over m of degree l of harmonics[e, m] dot[i(e), m, d], [E, K].

    TANGENT: out [2, E, K], x and x', from harmonics, dot and factor and their changes. One program: a receiver's edges
    and BK columns of one degree, whose 2l+1 rows are padded to BM.
    """
    i, _, k, in_k, m, in_m, at, mask = _rows_of_degree(M, D, K, BM, BK)
    rows = tl.load(dot + at, mask=mask, other=0.0)
    if TANGENT:
        rows_dot = tl.load(dot_dot + at, mask=mask, other=0.0)
    edges = E.to(tl.int64)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=in_m, other=0.0)[:, None]
        r = tl.load(factor + e * K + k, mask=in_k, other=0.0)
        z = tl.sum(y * rows, axis=0)
        tl.store(out + e * K + k, r * z, mask=in_k)
        if TANGENT:
            y_dot = tl.load(harmonics + (edges + e) * M + m, mask=in_m, other=0.0)[:, None]
            r_dot = tl.load(factor + (edges + e) * K + k, mask=in_k, other=0.0)
            z_dot = tl.sum(y_dot * rows + y * rows_dot, axis=0)
            tl.store(out + (edges + e) * K + k, r * z_dot + r_dot * z, mask=in_k)


@triton.jit(do_not_specialize=["E"])
def directional_backward_kernel(
    grad, harmonics, dot, dot_dot, factor, row_ptr, grad_factor, grad_harmonics, grad_dot, E,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Gradients of directional_kernel: by factor [T, E, K] (may be ``grad``), by dot [n, M, D], and by harmonics.

    The last in parts, grad_harmonics [blocks of columns of a degree, T, E, M]. T = 1, with TANGENT 2.
    """
    i, block, k, in_k, m, in_m, at, mask = _rows_of_degree(M, D, K, BM, BK)
    rows = tl.load(dot + at, mask=mask, other=0.0)
    if TANGENT:
        rows_dot = tl.load(dot_dot + at, mask=mask, other=0.0)
    edges = E.to(tl.int64)
    T: tl.constexpr = 2 if TANGENT else 1
    part = grad_harmonics + block * (T * edges * M)
    by_dot = tl.zeros([BM, BK], dtype=grad_dot.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=in_m, other=0.0)[:, None]
        g = tl.load(grad + e * K + k, mask=in_k, other=0.0)
        r = tl.load(factor + e * K + k, mask=in_k, other=0.0)
        z = tl.sum(y * rows, axis=0)
        by_factor, by_z = g * z, g * r
        if TANGENT:
            y_dot = tl.load(harmonics + (edges + e) * M + m, mask=in_m, other=0.0)[:, None]
            h = tl.load(grad + (edges + e) * K + k, mask=in_k, other=0.0)
            by_factor += h * tl.sum(y_dot * rows + y * rows_dot, axis=0)
            by_z += h * tl.load(factor + (edges + e) * K + k, mask=in_k, other=0.0)
        tl.debug_barrier()  # several warps may have read the same numbers, which are now written over
        tl.store(grad_factor + e * K + k, by_factor, mask=in_k)
        by_rows, by_y = y * by_z[None, :], rows * by_z[None, :]
        if TANGENT:
            tl.store(grad_factor + (edges + e) * K + k, h * z, mask=in_k)
            h = (h * r)[None, :]
            by_rows += y_dot * h
            by_y += rows_dot * h
            tl.store(part + (edges + e) * M + m, tl.sum(rows * h, axis=1), mask=in_m)
        by_dot += by_rows
        tl.store(part + e * M + m, tl.sum(by_y, axis=1), mask=in_m)
    tl.store(grad_dot + at, by_dot, mask=mask)


@triton.jit(do_not_specialize=["E"])
def harmonics_second_kernel(
    grad, vec, vec_dot, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """out [E, 3] += gradient by vec of <g, Y> + <h, Y'>. grad: [S, 2, E, M], g and h in S parts that are added up.

    Long: values, slopes and their changes go through one loop over the orders.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = vector_of(vec, e, inside, UNIT)
    x_dot, y_dot, z_dot, d_dot = vector_dot(vec_dot, e, inside, x, y, z, d, UNIT)
    r2 = x * x + y * y + z * z
    r2_dot = 2.0 * (x * x_dot + y * y_dot + z * z_dot)
    M: tl.constexpr = (L + 1) * (L + 1)
    plane = E.to(tl.int64) * M
    at = grad + e * M
    zero = 0.0 * x
    c = zero + 1.0
    s = zero
    c_dot, s_dot = zero, zero
    # derivatives of c and s by x and z; p depends on y and r2
    cx, cz, sx, sz = zero, zero, zero, zero
    cx_dot, cz_dot, sx_dot, sz_dot = zero, zero, zero, zero
    # g: q and what comes through r2, with q' of h added; h: the same numbers without the changes
    gx, gy, gz, by_r2 = zero, zero, zero, zero
    hx, hy, hz, h_r2 = zero, zero, zero, zero
    top = c
    for m in tl.static_range(L + 1):
        before, before_y, before_r, before_dot, before_y_dot, before_r_dot = zero, zero, zero, zero, zero, zero
        p, py, pr, p_dot, py_dot, pr_dot = top, zero, zero, zero, zero, zero
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                after_y = ((2 * l - 1) * (p + y * py) - (l + m - 1) * r2 * before_y) / (l - m)
                after_r = ((2 * l - 1) * y * pr - (l + m - 1) * (before + r2 * before_r)) / (l - m)
                after_dot = (2 * l - 1) * (y_dot * p + y * p_dot)
                after_dot = (after_dot - (l + m - 1) * (r2_dot * before + r2 * before_dot)) / (l - m)
                after_y_dot = (2 * l - 1) * (p_dot + y_dot * py + y * py_dot)
                after_y_dot = (after_y_dot - (l + m - 1) * (r2_dot * before_y + r2 * before_y_dot)) / (l - m)
                after_r_dot = (l + m - 1) * (before_dot + r2_dot * before_r + r2 * before_r_dot)
                after_r_dot = ((2 * l - 1) * (y_dot * pr + y * pr_dot) - after_r_dot) / (l - m)
                before, before_y, before_r, before_dot, before_y_dot, before_r_dot = p, py, pr, p_dot, py_dot, pr_dot
                p, py, pr, p_dot, py_dot, pr_dot = after, after_y, after_r, after_dot, after_y_dot, after_r_dot
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * total_of(at + l * l + l + m, 2 * plane, inside, S)
            h = scale * total_of(at + plane + l * l + l + m, 2 * plane, inside, S)
            gx += g * p * cx + h * (p_dot * cx + p * cx_dot)
            gy += g * py * c + h * (py_dot * c + py * c_dot)
            gz += g * p * cz + h * (p_dot * cz + p * cz_dot)
            by_r2 += g * pr * c + h * (pr_dot * c + pr * c_dot)
            hx, hy, hz, h_r2 = add_slopes(hx, hy, hz, h_r2, h, p, py, pr, c, cx, cz)
            if m > 0:
                g = scale * total_of(at + l * l + l - m, 2 * plane, inside, S)
                h = scale * total_of(at + plane + l * l + l - m, 2 * plane, inside, S)
                gx += g * p * sx + h * (p_dot * sx + p * sx_dot)
                gy += g * py * s + h * (py_dot * s + py * s_dot)
                gz += g * p * sz + h * (p_dot * sz + p * sz_dot)
                by_r2 += g * pr * s + h * (pr_dot * s + pr * s_dot)
                hx, hy, hz, h_r2 = add_slopes(hx, hy, hz, h_r2, h, p, py, pr, s, sx, sz)
        top = top * (2 * m + 1)
        cx_dot, cz_dot, sx_dot, sz_dot = next_order_slopes_dot(
            c_dot, s_dot, cx, cz, sx, sz, cx_dot, cz_dot, sx_dot, sz_dot, x, z, x_dot, z_dot
        )
        cx, cz, sx, sz = next_order_slopes(c, s, cx, cz, sx, sz, x, z)
        c_dot, s_dot = next_order_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot)
        c, s = next_order(c, s, x, z)
    gx += 2.0 * (x * by_r2 + x_dot * h_r2)
    gy += 2.0 * (y * by_r2 + y_dot * h_r2)
    gz += 2.0 * (z * by_r2 + z_dot * h_r2)
    if UNIT:
        hx += 2.0 * x * h_r2
        hy += 2.0 * y * h_r2
        hz += 2.0 * z * h_r2
        along = gx * x + gy * y + gz * z + hx * x_dot + hy * y_dot + hz * z_dot
        across = hx * x + hy * y + hz * z
        fade = d_dot / d  # of 1/d, which stands before the projection
        gx = (gx - along * x - across * x_dot - fade * (hx - across * x)) / d
        gy = (gy - along * y - across * y_dot - fade * (hy - across * y)) / d
        gz = (gz - along * z - across * z_dot - fade * (hz - across * z)) / d
    vx, vy, vz = load_vector(out, e, inside, 0.0)
    store_vector(out, e, inside, vx + gx, vy + gy, vz + gz)
