r"""Triton kernels of the edge-degree embedding.

:math:`F = \sum_e \sum_{m,c} Y_{em} a_{e l(m) c} g_{i(e) m c}`, linear in the harmonics Y [e, M], the radial features
a [e, L, K] and g [n, M, K]; the kernels are its three partial derivatives. Receivers own their edges: no scatter.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
