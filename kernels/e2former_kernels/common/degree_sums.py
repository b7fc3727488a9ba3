"""Sums over the rows of each degree, in one pass and in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_problem
from e2former_kernels.common.tiles import ceil_div


def degree_sums(x: Tensor) -> Tensor:
    """x: [(L+1)^2, ...] -> [L+1, ...]. No gradient."""
    degrees = round(x.shape[0] ** 0.5)
    if not x.numel() or triton_problem(x.device) is not None:
        return torch.stack([x[l * l : (l + 1) ** 2].sum(0) for l in range(degrees)])
    from e2former_kernels.common.degree_sums_kernel import degree_sums_kernel  # needs the triton package

    x = x.contiguous()
    out, numbers = x.new_empty(degrees, *x.shape[1:]), x[0].numel()
    degree_sums_kernel[degrees, ceil_div(numbers, 1024)](x, out, numbers, BLOCK=1024)
    return out
