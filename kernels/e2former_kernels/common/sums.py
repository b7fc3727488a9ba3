"""Sums in a fixed order, the same bits every time: of the rows of a degree, over runs of nodes."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def degree_sums_kernel(x, out, K, BLOCK: tl.constexpr):
    """out[l, k] = sum over m of degree l of x[m, k]."""
    l = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for m in range(l * l, (l + 1) * (l + 1)):
        total += tl.load(x + m * K + k, mask=k < K, other=0.0)
    tl.store(out + l * K + k, total, mask=k < K)


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
        """Add the sum over the rows of each matrix."""
        for name, matrix in matrices.items():
            self.add(name, matrix.sum(0))

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add a @ b, of two matrices or two batches of matrices, without a copy of the product."""
        if name not in self:
            self[name] = a @ b
        elif a.dim() == 3:
            self[name].baddbmm_(a, b)
        else:
            self[name].addmm_(a, b)
