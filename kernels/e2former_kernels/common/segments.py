"""Sums over the edges of a receiver in a fixed order, differentiable to any order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.tiles import ceil_div, next_power


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


@torch.library.custom_op("e2former_kernels::segment_sum", mutates_args=())
def segment_sum(values: Tensor, row_ptr: Tensor, target: Tensor) -> Tensor:
    """Sum of rows per receiver. values: [E, H]; row_ptr: [N+1]; target: [E]. Returns [N, H]."""
    nodes, width = row_ptr.numel() - 1, values.shape[1]
    out = values.new_zeros(nodes, width)
    if out.numel() and values.numel():
        block = min(next_power(width), 128)
        grid = (nodes, ceil_div(width, block))
        _segment_sum_kernel[grid](values.contiguous(), row_ptr, out, width, BLOCK=block, num_warps=1)
    return out


@segment_sum.register_fake
def _(values: Tensor, row_ptr: Tensor, target: Tensor) -> Tensor:
    return values.new_empty(row_ptr.shape[0] - 1, values.shape[1])


@torch.library.custom_op("e2former_kernels::expand_rows", mutates_args=())
def expand_rows(x: Tensor, row_ptr: Tensor, target: Tensor) -> Tensor:
    """Row of the receiver for each edge, the transpose of :func:`segment_sum`. x: [N, H]. Returns [E, H]."""
    return x.index_select(0, target)


@expand_rows.register_fake
def _(x: Tensor, row_ptr: Tensor, target: Tensor) -> Tensor:
    return x.new_empty(target.shape[0], x.shape[1])


def _save_index(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _segment_sum_backward(ctx, grad: Tensor):
    return expand_rows(grad, *ctx.saved_tensors), None, None


def _expand_rows_backward(ctx, grad: Tensor):
    return segment_sum(grad, *ctx.saved_tensors), None, None


segment_sum.register_autograd(_segment_sum_backward, setup_context=_save_index)
expand_rows.register_autograd(_expand_rows_backward, setup_context=_save_index)
