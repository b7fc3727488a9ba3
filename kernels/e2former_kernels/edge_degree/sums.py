r"""Sums over a receiver's edges of harmonics times radial features, and their derivatives, without a graph.

:math:`F = \sum_e \sum_{m,c} Y_{em} a_{e l(m) c} g_{i(e) m c}` is linear in the harmonics Y [E, M], the radial features
a [E, L, K] and g [N, M, K]; the kernels are its three partial derivatives. Receivers own their edges (row_ptr: [N+1]):
no scatter. Tensors are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.tiles import ceil_div, next_power


@triton.jit
def _degree(m):
    """Degree of row m, for up to 25 rows."""
    one = m * 0 + 1
    return tl.where(m >= 1, one, 0) + tl.where(m >= 4, one, 0) + tl.where(m >= 9, one, 0) + tl.where(m >= 16, one, 0)


@triton.jit
def harmonic_sum_kernel(
    harmonics, features, row_ptr, out, M, L, K, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out[i, m, c] = sum over edges e of i of Y[e, m] a[e, l(m), c]."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    m = tl.arange(0, BM)
    mask = (m[:, None] < M) & (c[None, :] < K)
    at = _degree(m)[:, None] * K + c[None, :]
    total = tl.zeros([BM, BK], dtype=out.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        y = tl.load(harmonics + e * M + m, mask=m < M, other=0.0)
        total += y[:, None] * tl.load(features + e * L * K + at, mask=mask, other=0.0)
    tl.store(out + i * M * K + m[:, None] * K + c[None, :], total, mask=mask)


@triton.jit
def harmonic_features_kernel(harmonics, grad, row_ptr, out, M, L, K, BL: tl.constexpr, BK: tl.constexpr):
    """out[e, l, c] = sum over the rows m of degree l of Y[e, m] g[i(e), m, c]."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = c < K
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        for l in tl.static_range(BL):
            total = tl.zeros([BK], dtype=out.dtype.element_ty)
            for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                g = tl.load(grad + (i * M + m) * K + c, mask=inside, other=0.0)
                total += tl.load(harmonics + e * M + m) * g
            tl.store(out + (e * L + l) * K + c, total, mask=inside)


@triton.jit
def harmonic_dot_kernel(features, grad, row_ptr, out, M, L, K, BM: tl.constexpr, BK: tl.constexpr):
    """out[e, m] = sum over c of a[e, l(m), c] g[i(e), m, c]. BK covers all columns."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BK)
    m = tl.arange(0, BM)
    mask = (m[:, None] < M) & (c[None, :] < K)
    g = tl.load(grad + i * M * K + m[:, None] * K + c[None, :], mask=mask, other=0.0)
    at = _degree(m)[:, None] * K + c[None, :]
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        a = tl.load(features + e * L * K + at, mask=mask, other=0.0)
        tl.store(out + e * M + m, tl.sum(a * g, axis=1), mask=m < M)


@triton.jit
def _segment_sum_kernel(values, row_ptr, out, width, BLOCK: tl.constexpr):
    """out[i, :] = sum over the edges e of receiver i of values[e, :]. One program: one receiver, BLOCK columns."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        total += tl.load(values + e * width + c, mask=inside, other=0.0)
    tl.store(out + i * width + c, total, mask=inside)


def _warps(numbers: int) -> int:
    return 4 if numbers >= 2048 else 2


def harmonic_sum(harmonics: Tensor, features: Tensor, row_ptr: Tensor) -> Tensor:
    """sum_e Y_em a_e,l(m),c. harmonics: [E, M]; features: [E, L, K]. Returns [N, M, K]."""
    (_, rows), (_, degrees, width) = harmonics.shape, features.shape
    nodes = row_ptr.numel() - 1
    out = features.new_empty(nodes, rows, width)
    if out.numel():
        block = min(next_power(width), 128)
        harmonic_sum_kernel[nodes, ceil_div(width, block)](
            harmonics, features, row_ptr, out, rows, degrees, width,
            BM=next_power(rows), BK=block, num_warps=_warps(next_power(rows) * block),
        )  # fmt: skip
    return out


def harmonic_features(harmonics: Tensor, grad: Tensor, row_ptr: Tensor, out: Tensor) -> Tensor:
    """out = sum over m of degree l of Y_em g_imc. harmonics: [E, M]; grad: [N, M, K]; out: [E, L, K]."""
    (_, degrees, width), (nodes, rows, _) = out.shape, grad.shape
    if out.numel():
        block = min(next_power(width), 128)
        harmonic_features_kernel[nodes, ceil_div(width, block)](
            harmonics, grad, row_ptr, out, rows, degrees, width, BL=degrees, BK=block, num_warps=1
        )
    return out


def harmonic_dot(features: Tensor, grad: Tensor, row_ptr: Tensor) -> Tensor:
    """<a_e,l(m), g_im>. features: [E, L, K]; grad: [N, M, K]. Returns [E, M]."""
    (edges, degrees, width), (nodes, rows, _) = features.shape, grad.shape
    out = grad.new_empty(edges, rows)
    if out.numel():
        harmonic_dot_kernel[(nodes,)](
            features, grad, row_ptr, out, rows, degrees, width,
            BM=next_power(rows), BK=next_power(width), num_warps=_warps(next_power(rows) * next_power(width)),
        )  # fmt: skip
    return out


def segment_sum(values: Tensor, row_ptr: Tensor) -> Tensor:
    """Sum of rows per receiver, in a fixed order. values: [E, H]. Returns [N, H]."""
    nodes, width = row_ptr.numel() - 1, values.shape[1]
    out = values.new_zeros(nodes, width)
    if out.numel() and values.numel():
        block = min(next_power(width), 128)
        _segment_sum_kernel[nodes, ceil_div(width, block)](values, row_ptr, out, width, BLOCK=block, num_warps=1)
    return out
