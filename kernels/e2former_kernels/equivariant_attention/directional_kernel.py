r"""Triton kernels of the directional gate of the scores ``qk_dot`` and ``qk_dot_scalar``: harmonics, and the receiver's
rows contracted with them.

Columns k = l D + d, of which the first K count: degree l has D of them, and the harmonics of degree l are rows
:math:`l^2` to :math:`(l+1)^2` of M = (L+1)^2. With UNIT the harmonics are those of the direction, without it the solid
harmonics of the vector, by the recurrences of ``common/harmonics.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.harmonics_kernel import next_order, next_order_slopes


@triton.jit
def _vector(vec, e, inside, UNIT: tl.constexpr):
    x = tl.load(vec + 3 * e, mask=inside, other=1.0)
    y = tl.load(vec + 3 * e + 1, mask=inside, other=1.0)
    z = tl.load(vec + 3 * e + 2, mask=inside, other=1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    if UNIT:
        x, y, z = x / d, y / d, z / d
    return x, y, z, d


@triton.jit
def harmonics_kernel(vec, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """out [E, M]. scales: [L+1, L+1], the factor of each degree and order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, _ = _vector(vec, e, inside, UNIT)
    r2 = x * x + y * y + z * z
    to = out + e * ((L + 1) * (L + 1))
    c = 0.0 * x + 1.0
    s = 0.0 * x
    top = 0.0 * x + 1.0
    for m in tl.static_range(L + 1):
        before = 0.0 * x
        p = top
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                before = p
                p = after
            factor = p * tl.load(scales + l * (L + 1) + m)
            tl.store(to + l * l + l + m, factor * c, mask=inside)
            if m > 0:
                tl.store(to + l * l + l - m, factor * s, mask=inside)
        top = top * (2 * m + 1)
        c, s = next_order(c, s, x, z)


@triton.jit
def _parts(at, stride, inside, S: tl.constexpr):
    """Sum of S numbers ``stride`` apart."""
    total = tl.load(at, mask=inside, other=0.0)
    for n in tl.static_range(1, S):
        total += tl.load(at + n * stride, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def harmonics_backward_kernel(
    grad, vec, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """out [E, 3] += gradient of harmonics_kernel by vec. grad: [S, E, M], in S parts that are added up here."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = _vector(vec, e, inside, UNIT)
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
        before = 0.0 * x
        before_y = 0.0 * x
        before_r = 0.0 * x
        p = top
        py = 0.0 * x
        pr = 0.0 * x
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                after_y = ((2 * l - 1) * (p + y * py) - (l + m - 1) * r2 * before_y) / (l - m)
                after_r = ((2 * l - 1) * y * pr - (l + m - 1) * (before + r2 * before_r)) / (l - m)
                before = p
                before_y = py
                before_r = pr
                p = after
                py = after_y
                pr = after_r
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * _parts(at + l * l + l + m, stride, inside, S)
            gx += g * p * cx
            gy += g * py * c
            gz += g * p * cz
            by_r2 += g * pr * c
            if m > 0:
                g = scale * _parts(at + l * l + l - m, stride, inside, S)
                gx += g * p * sx
                gy += g * py * s
                gz += g * p * sz
                by_r2 += g * pr * s
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
    to = out + 3 * e
    tl.store(to, tl.load(to, mask=inside, other=0.0) + gx, mask=inside)
    tl.store(to + 1, tl.load(to + 1, mask=inside, other=0.0) + gy, mask=inside)
    tl.store(to + 2, tl.load(to + 2, mask=inside, other=0.0) + gz, mask=inside)


@triton.jit
def _columns(D: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Degree, block of columns, columns d within the degree, and those of them that there are and that count."""
    BLOCKS: tl.constexpr = (D + BK - 1) // BK
    l = tl.program_id(1) // BLOCKS
    block = tl.program_id(1) % BLOCKS
    d = block * BK + tl.arange(0, BK)
    return l, block, d, d < D, (d < D) & (l * D + d < K)


@triton.jit
def directional_kernel(
    harmonics, dot, factor, row_ptr, out,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[e, k] = factor[e, k] sum over m of degree l of harmonics[e, m] dot[i(e), m, d], [E, K].

    One program: a receiver's edges and BK columns of one degree, whose 2l+1 rows are padded to BM.
    """
    i = tl.program_id(0).to(tl.int64)
    l, _, d, in_d, in_k = _columns(D, K, BK)
    m = tl.arange(0, BM)
    in_m = m < 2 * l + 1
    m += l * l
    x = tl.load(dot + i * (M * D) + m[:, None] * D + d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0)
    k = l * D + d
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=in_m, other=0.0)
        r = tl.load(factor + e * K + k, mask=in_k, other=0.0)
        tl.store(out + e * K + k, r * tl.sum(y[:, None] * x, axis=0), mask=in_k)


@triton.jit(do_not_specialize=["E"])
def directional_backward_kernel(
    grad, harmonics, dot, factor, row_ptr, grad_factor, grad_harmonics, grad_dot, E,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of directional_kernel: by factor [E, K] (may be ``grad``), by dot [n, M, D], and by harmonics.

    The last in parts, grad_harmonics [blocks of columns of a degree, E, M].
    """
    i = tl.program_id(0).to(tl.int64)
    l, block, d, in_d, in_k = _columns(D, K, BK)
    m = tl.arange(0, BM)
    in_m = m < 2 * l + 1
    m += l * l
    at = m[:, None] * D + d[None, :]
    mask = in_m[:, None] & in_d[None, :]
    x = tl.load(dot + i * (M * D) + at, mask=mask, other=0.0)
    k = l * D + d
    part = grad_harmonics + block * (E.to(tl.int64) * M)
    by_dot = tl.zeros([BM, BK], dtype=grad_dot.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=in_m, other=0.0)
        g = tl.load(grad + e * K + k, mask=in_k, other=0.0)
        r = tl.load(factor + e * K + k, mask=in_k, other=0.0)
        tl.debug_barrier()  # several warps may have read the same numbers, which are now written over
        tl.store(grad_factor + e * K + k, g * tl.sum(y[:, None] * x, axis=0), mask=in_k)
        g *= r
        by_dot += y[:, None] * g[None, :]
        tl.store(part + e * M + m, tl.sum(x * g[None, :], axis=1), mask=in_m)
    tl.store(grad_dot + i * (M * D) + at, by_dot, mask=mask)
