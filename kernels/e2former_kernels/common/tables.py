"""Rows of small tables, with gradients that are added up in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


class _TableRows(torch.autograd.Function):
    """Rows of a small table; the gradient on a GPU is a matrix product with the one-hot index, not a scatter."""

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return _TableSums.apply(grad, index, ctx.rows), None


class _TableSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return table_sums(values, index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return _TableRows.apply(grad, index), None, None


def table_sums(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums of the values of each row of the table, in a fixed order. values: [E, ...]; index: [E]. No gradient."""
    if values.device.type == "cpu":  # where a scatter adds in order
        return values.new_zeros(rows, *values.shape[1:]).index_add_(0, index, values)
    one_hot = (index.unsqueeze(0) == torch.arange(rows, device=index.device).unsqueeze(1)).to(values.dtype)
    return (one_hot @ values.flatten(1)).view(rows, *values.shape[1:])


def table_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table of a hundred rows or so, with a deterministic gradient. table: [Z, ...]; index: [E]."""
    return _TableRows.apply(table, index)
