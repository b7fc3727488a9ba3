"""Gather and segment sum over sorted rows: deterministic, no atomics, differentiable to any order.

The two maps are adjoint to each other, so each is the other's derivative:

    gather:  y[e] = x[index[e]]                    x [R, ...] -> y [E, ...]
    sum:     x[r] = sum over e with index[e] = r   y [E, ...] -> x [R, ...]

Every sum is taken by one thread or one block, in a fixed order, so that the same input gives the same bits. ``index``
is either ascending, or a transposed CSR (order, pointer) says how to sort it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["gather_rows", "segment_sum"]

Transpose = Callable[[], tuple[Tensor | None, Tensor]]

# Segments longer than this are summed column by column on CUDA, where torch.segment_reduce gives one block to a segment
# of a one-dimensional tensor, but a single thread to a segment and column of a wider one.
_LONG_SEGMENT = 1024


def gather_rows(values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
    """``values[index]``, with a deterministic gradient.

    values: [R, ...] floating point. index: [E] int64 in [0, R). transpose: called when a gradient is needed; returns
    (order, pointer), the permutation [E] that sorts ``index`` (None if it is ascending) and its CSR pointer [R + 1].
    Returns [E, ...].
    """
    return _Gather.apply(values, index, transpose)


def segment_sum(values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
    """Sum of the rows of ``values`` that share an index; the adjoint of `gather_rows`.

    values: [E, ...] floating point. index: [E] int64 in [0, R). transpose: as for `gather_rows`. Returns [R, ...].
    """
    return _Sum.apply(values, index, transpose)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
        ctx.save_for_backward(index)
        ctx.transpose = transpose
        return values[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Sum.apply(grad, index, ctx.transpose), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
        ctx.save_for_backward(index)
        ctx.transpose = transpose
        order, pointer = transpose()
        return _reduce(values if order is None else values[order], pointer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Gather.apply(grad, index, ctx.transpose), None, None


def _reduce(values: Tensor, pointer: Tensor) -> Tensor:
    rows = pointer.shape[0] - 1
    if rows == 1:
        return values.sum(0, keepdim=True)
    if values.shape[0] == 0:
        return values.new_zeros((rows, *values.shape[1:]))
    if values.is_cuda and values.dim() > 1 and values.shape[0] > _LONG_SEGMENT * rows:
        columns = values.reshape(values.shape[0], -1).T.contiguous()
        summed = [torch.segment_reduce(column, "sum", offsets=pointer, axis=0, initial=0) for column in columns]
        return torch.stack(summed, dim=1).reshape(rows, *values.shape[1:])
    return torch.segment_reduce(values.contiguous(), "sum", offsets=pointer, axis=0, initial=0)
