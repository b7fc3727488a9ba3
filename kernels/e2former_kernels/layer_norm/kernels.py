"""Triton kernels of the norm: value, tangent and reverse, in float32 and with float16 rows. One program, one node."""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.half import load_numbers, store_half
from e2former_kernels.common.harmonics import degree_of


@triton.jit
def _centre(x, m, inside, C):
    """x with the mean of row 0 taken off row 0."""
    mean = tl.sum(tl.where(m[:, None] == 0, x, 0.0)) / C
    return tl.where((m[:, None] == 0) & inside, x - mean, x)


@triton.jit
def norm_kernel(
    x, weight, bias, shift, out, out_factor, M, C, L,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SHIFT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The norm of one node; HALF: as float16 rows with their factor (common/half.py)."""
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    centred = _centre(tl.load(x + n * M * C + at, mask=inside, other=0.0), m, inside, C)
    degree = degree_of(m)
    balance = 1.0 / ((2 * degree + 1) * L * C).to(centred.dtype)
    variance = tl.sum(centred * centred * balance[:, None])
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    y = centred * (1.0 / tl.sqrt(variance + EPS)) * gamma
    beta = tl.load(bias + c, mask=c < C, other=0.0)
    if SHIFT:
        beta += tl.load(shift + n * C + c, mask=c < C, other=0.0)
    y += tl.where(m[:, None] == 0, beta[None, :], 0.0)
    if HALF:
        store_half(y, out, n * M * C + at, inside, out_factor + n)
    else:
        tl.store(out + n * M * C + at, y, mask=inside)


@triton.jit
def norm_tangent_kernel(
    x, x_dot, weight, bias, out, out_dot, M, C, L, EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    VALUE: tl.constexpr,
):  # fmt: skip
    """The norm's change along x_dot, and with VALUE the norm itself."""
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    v = _centre(tl.load(x + n * M * C + at, mask=inside, other=0.0), m, inside, C)
    w = _centre(tl.load(x_dot + n * M * C + at, mask=inside, other=0.0), m, inside, C)
    degree = degree_of(m)
    balance = 1.0 / ((2 * degree + 1) * L * C).to(v.dtype)
    scale = 1.0 / tl.sqrt(tl.sum(v * v * balance[:, None]) + EPS)
    slope = -scale * scale * scale * tl.sum(v * w * balance[:, None])
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    tl.store(out_dot + n * M * C + at, (w * scale + v * slope) * gamma, mask=inside)
    if VALUE:
        beta = tl.load(bias + c, mask=c < C, other=0.0)
        y = v * scale * gamma + tl.where(m[:, None] == 0, beta[None, :], 0.0)
        tl.store(out + n * M * C + at, y, mask=inside)


@triton.jit
def norm_reverse_kernel(
    grad, grad_dot, x, x_dot, weight, beside, out, sums, N, M, C, L, each,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    VALUE: tl.constexpr, TANGENT: tl.constexpr, WEIGHTS: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Gradient by x of <grad, norm> (VALUE) + <grad_dot, change of the norm along x_dot> (TANGENT), ``each`` nodes.

    BESIDE: plus ``beside``. WEIGHTS: sums[program], [M, C]: the rows of the gradient by the norm's weight.
    """
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    degree = degree_of(m)
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    balance = (1.0 / ((2 * degree + 1) * L * C).to(gamma.dtype))[:, None]
    total = tl.zeros([BM, BC], dtype=gamma.dtype)
    for k in range(each):
        n = tl.program_id(0).to(tl.int64) * each + k
        here = (m[:, None] < tl.where(n < N, M, 0)) & (c[None, :] < C)
        row = n * M * C + at
        v = _centre(tl.load(x + row, mask=here, other=0.0), m, inside, C)
        scale = 1.0 / tl.sqrt(tl.sum(v * v * balance) + EPS)
        by_v = tl.zeros([BM, BC], dtype=gamma.dtype)
        by_scale = tl.sum(by_v)
        if VALUE:
            a = tl.load(grad + row, mask=here, other=0.0)
            if WEIGHTS:
                total += a * v * scale
            a = a * gamma
            by_v += a * scale
            by_scale += tl.sum(a * v)
        if TANGENT:
            w = _centre(tl.load(x_dot + row, mask=here, other=0.0), m, inside, C)
            cross = tl.sum(v * w * balance)
            slope = -scale * scale * scale * cross
            b = tl.load(grad_dot + row, mask=here, other=0.0)
            if WEIGHTS:
                total += b * (w * scale + v * slope)
            b = b * gamma
            by_slope = tl.sum(b * v)
            by_v += b * slope - (scale * scale * scale * by_slope) * balance * w
            by_scale += tl.sum(b * w) - 3.0 * scale * scale * cross * by_slope
        by_v -= (scale * scale * scale * by_scale) * balance * v
        by_x = _centre(by_v, m, inside, C)
        if BESIDE:
            by_x += tl.load(beside + row, mask=here, other=0.0)
        tl.store(out + row, by_x, mask=here)
    if WEIGHTS:
        tl.store(sums + tl.program_id(0).to(tl.int64) * M * C + at, total, mask=inside)


@triton.jit
def half_norm_reverse_kernel(
    grad, grad_factor, row_factors, more, more_factor, more_row_factors, beside, x, weight, out, M, C, L,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, MORE: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Gradient by x from that by the norm, grad[n, m, c] grad_factor[n] row_factors[m], with MORE another such term.

    BESIDE: added to ``beside``.
    """
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    row = n * M * C + m[:, None] * C + c[None, :]
    degree = degree_of(m)
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    balance = (1.0 / ((2 * degree + 1) * L * C).to(gamma.dtype))[:, None]
    v = _centre(tl.load(x + row, mask=inside, other=0.0), m, inside, C)
    scale = 1.0 / tl.sqrt(tl.sum(v * v * balance) + EPS)
    factor = tl.load(grad_factor + n) * tl.load(row_factors + m, mask=m < M, other=0.0)
    a = load_numbers(grad + row, inside) * factor[:, None]
    if MORE:
        factor = tl.load(more_factor + n) * tl.load(more_row_factors + m, mask=m < M, other=0.0)
        a += load_numbers(more + row, inside) * factor[:, None]
    a *= gamma
    by_v = a * scale - (scale * scale * scale * tl.sum(a * v)) * balance * v
    by_x = _centre(by_v, m, inside, C)
    if BESIDE:
        by_x += tl.load(beside + row, mask=inside, other=0.0)
    tl.store(out + row, by_x, mask=inside)
