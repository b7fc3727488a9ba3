"""Triton kernel of the column sums of a few matrices."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(x, stride, rows, width, block, steps, BR: tl.constexpr, BC: tl.constexpr):
    """Sum of this program's rows of a block of columns."""
    c = block * BC + tl.arange(0, BC)
    total = tl.zeros([BR, BC], dtype=x.dtype.element_ty)
    for k in range(steps):
        r = (tl.program_id(0).to(tl.int64) * steps + k) * BR + tl.arange(0, BR)
        total += tl.load(
            x + r[:, None] * stride + c[None, :], mask=(r < rows)[:, None] & (c < width)[None, :], other=0.0
        )
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["r0", "r1", "r2", "r3", "r4", "steps"])
def column_sums_kernel(
    x0, x1, x2, x3, x4, s0, s1, s2, s3, s4, r0, r1, r2, r3, r4, w0, w1, w2, w3, w4, out, total, steps,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[program] [total]: part of the column sums of x0 to x4 [r, w], stride s, one after the other."""
    block = tl.program_id(1)
    b1 = (w0 + BC - 1) // BC
    b2 = b1 + (w1 + BC - 1) // BC
    b3 = b2 + (w2 + BC - 1) // BC
    b4 = b3 + (w3 + BC - 1) // BC
    to = out + tl.program_id(0).to(tl.int64) * total
    c = tl.arange(0, BC)
    if block < b1:
        at = block * BC + c
        tl.store(to + at, _part(x0, s0, r0, w0, block, steps, BR, BC), mask=at < w0)
    elif block < b2:
        at = (block - b1) * BC + c
        tl.store(to + w0 + at, _part(x1, s1, r1, w1, block - b1, steps, BR, BC), mask=at < w1)
    elif block < b3:
        at = (block - b2) * BC + c
        tl.store(to + w0 + w1 + at, _part(x2, s2, r2, w2, block - b2, steps, BR, BC), mask=at < w2)
    elif block < b4:
        at = (block - b3) * BC + c
        tl.store(to + w0 + w1 + w2 + at, _part(x3, s3, r3, w3, block - b3, steps, BR, BC), mask=at < w3)
    else:
        at = (block - b4) * BC + c
        tl.store(to + w0 + w1 + w2 + w3 + at, _part(x4, s4, r4, w4, block - b4, steps, BR, BC), mask=at < w4)
