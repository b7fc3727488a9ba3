"""Triton kernel of the sums over the rows of each degree."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def degree_sums_kernel(x, out, K, BLOCK: tl.constexpr):
    """out[l, k] = sum over m of degree l of x[m, k]."""
    l = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for m in range(l * l, (l + 1) * (l + 1)):
        total += tl.load(x + m * K + k, mask=k < K, other=0.0)
    tl.store(out + l * K + k, total, mask=k < K)
