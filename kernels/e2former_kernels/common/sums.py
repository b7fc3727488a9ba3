"""Sums in a fixed order, the same bits every time: of the rows of a degree, over chunks of nodes."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def _degree_pointer(degrees: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(degrees + 1, device=device).square()


def degree_sums(x: Tensor) -> Tensor:
    """x: [(L+1)^2, ...] -> [L+1, ...]. No gradient."""
    pointer = _degree_pointer(math.isqrt(x.shape[0]), x.device)
    return torch.segment_reduce(x.contiguous(), "sum", offsets=pointer, axis=0, initial=0)


class ChunkSums(dict[str, Tensor]):
    """Named sums, added up in the order of the chunks: the same bits every time.

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
