r"""Triton kernels of the receiver's rows contracted with harmonics, along a change of everything, and of its gradient.

x = R z with z = <Y, D> over the rows of a degree, as :func:`directional_kernel` in ``directional_kernel.py``; along
changes Y', D', R' it changes by x' = R z' + R' z with z' = <Y', D> + <Y, D'>. From the gradients X, X' by x, x': by R
and R' X z + X' z' and X' z; with Z = X R + X' R' and Z' = X' R by z and z', the gradients by D are the sums over the
receiver's edges of Y Z + Y' Z', those by Y and Y' the sums over columns of D Z + D' Z' and D Z'.

Tensors of edges are [2, E, ...], the value and its change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.equivariant_attention.directional_kernel import _columns


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def directional_pair_kernel(
    harmonics, dot, dot_dot, factor, row_ptr, out, E,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [2, E, K]: x and x'. One program: a receiver's edges and BK columns of one degree, its rows padded to BM."""
    i = tl.program_id(0).to(tl.int64)
    l, _, d, in_d, in_k = _columns(D, K, BK)
    m = tl.arange(0, BM)
    in_m = m < 2 * l + 1
    m += l * l
    at = i * (M * D) + m[:, None] * D + d[None, :]
    mask = in_m[:, None] & in_d[None, :]
    rows = tl.load(dot + at, mask=mask, other=0.0)
    rows_dot = tl.load(dot_dot + at, mask=mask, other=0.0)
    k = l * D + d
    edges = E.to(tl.int64)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=in_m, other=0.0)[:, None]
        y_dot = tl.load(harmonics + (edges + e) * M + m, mask=in_m, other=0.0)[:, None]
        r = tl.load(factor + e * K + k, mask=in_k, other=0.0)
        r_dot = tl.load(factor + (edges + e) * K + k, mask=in_k, other=0.0)
        z = tl.sum(y * rows, axis=0)
        z_dot = tl.sum(y_dot * rows + y * rows_dot, axis=0)
        tl.store(out + e * K + k, r * z, mask=in_k)
        tl.store(out + (edges + e) * K + k, r * z_dot + r_dot * z, mask=in_k)


@triton.jit(do_not_specialize=["E"])
def directional_second_kernel(
    grad, harmonics, dot, dot_dot, factor, row_ptr, grad_factor, grad_harmonics, grad_dot, E,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients by factor [2, E, K] (may be ``grad``), by dot [n, M, D], and by harmonics, from that by x and x'.

    The last in parts, grad_harmonics [blocks of columns of a degree, 2, E, M].
    """
    i = tl.program_id(0).to(tl.int64)
    l, block, d, in_d, in_k = _columns(D, K, BK)
    m = tl.arange(0, BM)
    in_m = m < 2 * l + 1
    m += l * l
    at = i * (M * D) + m[:, None] * D + d[None, :]
    mask = in_m[:, None] & in_d[None, :]
    rows = tl.load(dot + at, mask=mask, other=0.0)
    rows_dot = tl.load(dot_dot + at, mask=mask, other=0.0)
    k = l * D + d
    edges = E.to(tl.int64)
    part = grad_harmonics + block * (2 * edges * M)
    by_dot = tl.zeros([BM, BK], dtype=grad_dot.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=in_m, other=0.0)[:, None]
        y_dot = tl.load(harmonics + (edges + e) * M + m, mask=in_m, other=0.0)[:, None]
        g = tl.load(grad + e * K + k, mask=in_k, other=0.0)
        h = tl.load(grad + (edges + e) * K + k, mask=in_k, other=0.0)
        r = tl.load(factor + e * K + k, mask=in_k, other=0.0)
        r_dot = tl.load(factor + (edges + e) * K + k, mask=in_k, other=0.0)
        z = tl.sum(y * rows, axis=0)
        z_dot = tl.sum(y_dot * rows + y * rows_dot, axis=0)
        tl.debug_barrier()  # several warps may have read the same numbers, which are now written over
        tl.store(grad_factor + e * K + k, g * z + h * z_dot, mask=in_k)
        tl.store(grad_factor + (edges + e) * K + k, h * z, mask=in_k)
        g = (g * r + h * r_dot)[None, :]
        h = (h * r)[None, :]
        by_dot += y * g + y_dot * h
        tl.store(part + e * M + m, tl.sum(rows * g + rows_dot * h, axis=1), mask=in_m)
        tl.store(part + (edges + e) * M + m, tl.sum(rows * h, axis=1), mask=in_m)
    tl.store(grad_dot + at, by_dot, mask=mask)
