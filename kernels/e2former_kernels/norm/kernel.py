"""Triton kernels of the equivariant norm: one program, one node."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _degree(m):
    one = m * 0 + 1
    return tl.where(m >= 1, one, 0) + tl.where(m >= 4, one, 0) + tl.where(m >= 9, one, 0) + tl.where(m >= 16, one, 0)


@triton.jit
def _centre(x, m, inside, C):
    """x with the mean of row 0 taken off row 0."""
    mean = tl.sum(tl.where(m[:, None] == 0, x, 0.0)) / C
    return tl.where((m[:, None] == 0) & inside, x - mean, x)


@triton.jit
def norm_kernel(x, weight, bias, shift, out, M, C, L, EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                SHIFT: tl.constexpr):  # fmt: skip
    """The norm of one node."""
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    centred = _centre(tl.load(x + n * M * C + at, mask=inside, other=0.0), m, inside, C)
    degree = _degree(m)
    balance = 1.0 / ((2 * degree + 1) * L * C).to(centred.dtype)
    variance = tl.sum(centred * centred * balance[:, None])
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    y = centred * (1.0 / tl.sqrt(variance + EPS)) * gamma
    beta = tl.load(bias + c, mask=c < C, other=0.0)
    if SHIFT:
        beta += tl.load(shift + n * C + c, mask=c < C, other=0.0)
    y += tl.where(m[:, None] == 0, beta[None, :], 0.0)
    tl.store(out + n * M * C + at, y, mask=inside)


@triton.jit
def norm_backward_kernel(grad, x, weight, out, M, C, L, EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Gradient by x of one node."""
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    centred = _centre(tl.load(x + n * M * C + at, mask=inside, other=0.0), m, inside, C)
    degree = _degree(m)
    balance = 1.0 / ((2 * degree + 1) * L * C).to(centred.dtype)
    variance = tl.sum(centred * centred * balance[:, None])
    scale = 1.0 / tl.sqrt(variance + EPS)
    gamma = tl.load(weight + degree[:, None] * C + c[None, :], mask=inside, other=0.0)
    g = tl.load(grad + n * M * C + at, mask=inside, other=0.0) * gamma
    g = scale * g - (scale * scale * scale * tl.sum(g * centred)) * balance[:, None] * centred
    g = _centre(g, m, inside, C)
    tl.store(out + n * M * C + at, g, mask=inside)
