"""Sums over the rows of each degree, in one pass and in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.backend import triton_problem
from e2former_kernels.common.tiles import ceil_div


@triton.jit
def _degree_sums_kernel(x, out, K, BLOCK: tl.constexpr):
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
    if not x.numel() or triton_problem(x.device) is not None:
        return torch.stack([x[l * l : (l + 1) ** 2].sum(0) for l in range(degrees)])
    x = x.contiguous()
    out, numbers = x.new_empty(degrees, *x.shape[1:]), x[0].numel()
    _degree_sums_kernel[degrees, ceil_div(numbers, 1024)](x, out, numbers, BLOCK=1024)
    return out
