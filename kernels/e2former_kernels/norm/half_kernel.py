"""The norm with its result, or the gradient by it, as float16 rows (``common/half.py``): one program, one node."""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.norm.kernel import _centre, _degree, norm_of_node


@triton.jit
def norm_rows_kernel(
    x, weight, bias, shift, out, out_factor, M, C, L,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The norm of one node as float16 numbers of at most 1, and their factor."""
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    y = norm_of_node(x, weight, bias, shift, n, m, c, M, C, L, EPS, SHIFT)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    top = tl.max(tl.abs(y))
    top = tl.where(top > 0.0, top, 1.0)
    tl.store(out + n * M * C + at, (y / top).to(tl.float16), mask=inside)
    tl.store(out_factor + n, top)


@triton.jit
def norm_rows_reverse_kernel(
    grad, grad_factor, row_factors, more, more_factor, more_row_factors, beside, x, weight, out, M, C, L,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, MORE: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Gradient by x from that by the norm, grad[n, m, c] grad_factor[n] row_factors[m], with MORE a second such term.

    BESIDE: added to ``beside``.
    """
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    row = n * M * C + m[:, None] * C + c[None, :]
    degree = _degree(m)
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    balance = (1.0 / ((2 * degree + 1) * L * C).to(gamma.dtype))[:, None]
    v = _centre(tl.load(x + row, mask=inside, other=0.0), m, inside, C)
    scale = 1.0 / tl.sqrt(tl.sum(v * v * balance) + EPS)
    factor = tl.load(grad_factor + n) * tl.load(row_factors + m, mask=m < M, other=0.0)
    a = tl.load(grad + row, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    if MORE:
        factor = tl.load(more_factor + n) * tl.load(more_row_factors + m, mask=m < M, other=0.0)
        a += tl.load(more + row, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    a *= gamma
    by_v = a * scale - (scale * scale * scale * tl.sum(a * v)) * balance * v
    by_x = _centre(by_v, m, inside, C)
    if BESIDE:
        by_x += tl.load(beside + row, mask=inside, other=0.0)
    tl.store(out + row, by_x, mask=inside)
