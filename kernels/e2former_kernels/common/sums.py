"""Sums in a fixed order, the same bits every time: of columns, of the rows of a degree, over runs of nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _part(x, stride, rows, width, block, tiles, BR: tl.constexpr, BC: tl.constexpr):
    """Sum of this program's rows of a block of columns."""
    c = block * BC + tl.arange(0, BC)
    total = tl.zeros([BR, BC], dtype=x.dtype.element_ty)
    for k in range(tiles):
        r = (tl.program_id(0).to(tl.int64) * tiles + k) * BR + tl.arange(0, BR)
        total += tl.load(
            x + r[:, None] * stride + c[None, :], mask=(r < rows)[:, None] & (c < width)[None, :], other=0.0
        )
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["r0", "r1", "r2", "r3", "r4", "tiles"])
def column_sums_kernel(
    x0, x1, x2, x3, x4, s0, s1, s2, s3, s4, r0, r1, r2, r3, r4, w0, w1, w2, w3, w4, out, total, tiles,
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
        tl.store(to + at, _part(x0, s0, r0, w0, block, tiles, BR, BC), mask=at < w0)
    elif block < b2:
        at = (block - b1) * BC + c
        tl.store(to + w0 + at, _part(x1, s1, r1, w1, block - b1, tiles, BR, BC), mask=at < w1)
    elif block < b3:
        at = (block - b2) * BC + c
        tl.store(to + w0 + w1 + at, _part(x2, s2, r2, w2, block - b2, tiles, BR, BC), mask=at < w2)
    elif block < b4:
        at = (block - b3) * BC + c
        tl.store(to + w0 + w1 + w2 + at, _part(x3, s3, r3, w3, block - b3, tiles, BR, BC), mask=at < w3)
    else:
        at = (block - b4) * BC + c
        tl.store(to + w0 + w1 + w2 + w3 + at, _part(x4, s4, r4, w4, block - b4, tiles, BR, BC), mask=at < w4)


@triton.jit
def degree_sums_kernel(x, out, K, BLOCK: tl.constexpr):
    """out[l, k] = sum over m of degree l of x[m, k]."""
    l = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for m in range(l * l, (l + 1) * (l + 1)):
        total += tl.load(x + m * K + k, mask=k < K, other=0.0)
    tl.store(out + l * K + k, total, mask=k < K)


AT_ONCE = 5  # matrices of a launch
COLUMNS, ROWS = 128, 16  # of a tile
MAX_PARTS = 64  # partial sums of a column


def column_sums(*matrices: Tensor) -> Sequence[Tensor]:
    """Sums over the rows of up to five matrices [n, width], n of their own, columns side by side in memory.

    Returns as many vectors, parts of one. No gradient.
    """
    first, number = matrices[0], len(matrices)
    if number == 1 or not all(x.numel() for x in matrices):
        return [x.sum(0) for x in matrices]
    widths, rows = [x.shape[1] for x in matrices], [x.shape[0] for x in matrices]
    tiles = math.ceil(max(rows) / (ROWS * MAX_PARTS))
    missing = AT_ONCE - number
    parts = first.new_empty(math.ceil(max(rows) / (ROWS * tiles)), sum(widths))
    column_sums_kernel[parts.shape[0], sum(math.ceil(w / COLUMNS) for w in widths)](
        *matrices, *[first] * missing, *(x.stride(0) for x in matrices), *[0] * missing, *rows, *[0] * missing,
        *widths, *[0] * missing, parts, parts.shape[1], tiles, BR=ROWS, BC=COLUMNS, num_warps=4,
    )  # fmt: skip
    return parts.sum(0).split(widths)


def degree_sums(x: Tensor) -> Tensor:
    """x: [(L+1)^2, ...] -> [L+1, ...]. No gradient."""
    degrees = round(x.shape[0] ** 0.5)
    if not x.numel():
        return torch.stack([x[l * l : (l + 1) ** 2].sum(0) for l in range(degrees)])
    x = x.contiguous()
    out, numbers = x.new_empty(degrees, *x.shape[1:]), x[0].numel()
    degree_sums_kernel[degrees, math.ceil(numbers / 1024)](x, out, numbers, BLOCK=1024)
    return out


class RunSums(dict[str, Tensor]):
    """Named sums, added up in the order of the runs: the same bits every time.

    The first term of a name becomes its sum, so it must not be a view of something that changes later.
    """

    def add(self, name: str, term: Tensor) -> None:
        """Add a term."""
        if name in self:
            self[name] += term
        else:
            self[name] = term

    def add_columns(self, **matrices: Tensor) -> None:
        """Add the sum over the rows of each matrix, of up to five at once."""
        for name, term in zip(matrices, column_sums(*matrices.values()), strict=True):
            self.add(name, term)

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add a @ b, of two matrices or two batches of matrices, without a copy of the product."""
        if name not in self:
            self[name] = a @ b
        elif a.dim() == 3:
            self[name].baddbmm_(a, b)
        else:
            self[name].addmm_(a, b)
