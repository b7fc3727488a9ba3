"""Gather and segment sum over sorted rows: deterministic, no atomics, differentiable to any order.

The two maps are adjoint to each other, so each is the other's derivative:

    gather:  y[e] = x[index[e]]                    x [R, ...] -> y [E, ...]
    sum:     x[r] = sum over e with index[e] = r   y [E, ...] -> x [R, ...]

Every sum is taken by one thread or one block, in a fixed order, so that the same input gives the same bits. ``index``
is either ascending, or a transposed CSR (order, pointer) says how to sort it.

Autograd keeps the function that gives the CSR for as long as the result lives. It must not reach the result: a method
of an object that holds the result would keep both for ever, since autograd's nodes are invisible to the collector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Transposed", "ascending", "csr_of", "gather_rows", "row_pointer", "segment_sum"]

Transpose = Callable[[], tuple[Tensor | None, Tensor]]


class Transposed:
    """The transposed CSR of an index, sorted when it is first asked for.

    Args:
        index: [E] int64 in [0, rows).
        rows: number of rows.
        order: [E], the stable permutation that sorts ``index``; None: sorted here when it is needed.
        pointer: [rows + 1], where each row's entries begin in that order; None: counted here when it is needed.
    """

    def __init__(self, index: Tensor, rows: int, order: Tensor | None = None, pointer: Tensor | None = None) -> None:
        self._index, self._rows, self._order, self._pointer = index, rows, order, pointer

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Order and pointer, as `gather_rows` takes it."""
        return self.order, self.pointer

    @property
    def order(self) -> Tensor:
        """[E] int64."""
        if self._order is None:
            # a radix sort passes over the bits
            narrow = torch.int16 if self._rows < 2**15 else torch.int32
            ascending, self._order = self._index.to(narrow).sort(stable=True)
            if self._pointer is None:
                self._pointer = row_pointer(ascending, self._rows)
        return self._order

    @property
    def pointer(self) -> Tensor:
        """[rows + 1] int64."""
        if self._pointer is None:
            self._pointer = row_pointer(self._index.index_select(0, self.order), self._rows)
        return self._pointer


def ascending(pointer: Tensor) -> tuple[None, Tensor]:
    """The CSR of an index that ascends, as `gather_rows` takes it."""
    return None, pointer


def csr_of(index: Tensor, rows: int) -> Transpose:
    """The CSR of an index [E] that ascends, found when it is asked for."""
    return lambda: (None, row_pointer(index, rows))


def row_pointer(ascending: Tensor, rows: int) -> Tensor:
    """Where each row's entries begin: the CSR pointer [rows + 1] of an ascending index [E] in [0, rows)."""
    return torch.searchsorted(ascending, torch.arange(rows + 1, device=ascending.device, dtype=ascending.dtype))


# Segments longer than this are summed column by column on CUDA, where torch.segment_reduce gives one block to a segment
# of a one-dimensional tensor, but a single thread to a segment and column of a wider one.
_LONG_SEGMENT = 1024


def gather_rows(values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
    """``values[index]``, with a deterministic gradient.

    Args:
        values: [R, ...] floating point.
        index: [E] int64 in [0, R).
        transpose: called when a gradient is needed; returns (order, pointer), the permutation [E] that sorts ``index``
            (None if it is ascending) and its CSR pointer [R + 1].

    Returns:
        [E, ...].
    """
    return _Gather.apply(values, index, transpose)


def segment_sum(values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
    """Sum of the rows of ``values`` that share an index; the adjoint of `gather_rows`.

    Args:
        values: [E, ...] floating point.
        index: [E] int64 in [0, R).
        transpose: as for `gather_rows`.

    Returns:
        [R, ...].
    """
    return _Sum.apply(values, index, transpose)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, transpose: Transpose) -> Tensor:
        ctx.save_for_backward(index)
        ctx.transpose = transpose
        return values.index_select(0, index)

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
        return _reduce(values if order is None else values.index_select(0, order), pointer)

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
