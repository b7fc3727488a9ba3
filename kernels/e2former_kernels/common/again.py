"""Inputs of an operation that its backward pass computes again instead of keeping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Again = tuple[Tensor, Callable[[], Tensor] | None]


@contextlib.contextmanager
def computed_again(*inputs: Again) -> Iterator[None]:
    """Autograd nodes made inside keep no copy of the given tensors: they call for them when they run.

    inputs: pairs of a contiguous tensor and a function that gives the same numbers again, from tensors that are kept
    anyway. None instead of a function: the tensor is kept. The graph that the tensor belongs to is remembered, so
    derivatives of every order are those of the tensor itself.
    """
    makers = [(t.data_ptr(), t.numel(), make) for t, make in inputs if make is not None and t.requires_grad]
    if not makers or not torch.is_grad_enabled():
        yield
        return

    def pack(tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], Sequence[int]]:
        for address, numbers, make in makers:
            if tensor.data_ptr() == address and tensor.numel() == numbers and tensor.is_contiguous():
                return make, tensor.shape
        return tensor

    def unpack(packed: Tensor | tuple[Callable[[], Tensor], Sequence[int]]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, shape = packed
        with torch.no_grad():
            return make().view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
