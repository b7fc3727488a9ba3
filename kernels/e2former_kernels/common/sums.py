"""Sums: of a receiver's edges, in plain PyTorch; of the rows of a degree and over chunks of nodes, in a fixed order,
the same bits every time.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MAX_PADDING = 4  # padded edges for one real one


def segment_max(values: Tensor, target: Tensor, num_nodes: int) -> Tensor:
    """Largest value per receiver, differentiable (to the first edge that attains it); 0 where there is no edge.

    values: [E, H]; target: [E], receivers, num_nodes of them. Returns [num_nodes, H].
    """
    num_edges, heads = values.shape
    index = target.unsqueeze(1).expand(-1, heads)
    with torch.no_grad():
        top = values.new_full((num_nodes, heads), -math.inf).scatter_reduce(0, index, values, "amax")
        position = torch.arange(num_edges, device=values.device).unsqueeze(1).expand(-1, heads)
        position = torch.where(values == top.index_select(0, target), position, num_edges)
        first = position.new_full((num_nodes, heads), num_edges).scatter_reduce(0, index, position, "amin")
    # one row of zeros stands in for "no edge"
    return torch.cat([values, values.new_zeros(1, heads)]).gather(0, first)


def segment_sum(values: Tensor, target: Tensor, num_nodes: int) -> Tensor:
    """Sum of edge values per receiver: values [E, ...], target [E] -> [num_nodes, ...]."""
    return values.new_zeros((num_nodes, *values.shape[1:])).index_add(0, target, values)


def segment_outer(left: Tensor, right: Tensor, target: Tensor, num_nodes: int) -> Tensor:
    """Sum of outer products per receiver, as one matrix product for each.

    A receiver's edges become the inner dimension, padded to the largest number of edges; very uneven receivers are
    summed column by column instead.

    left: [E, I]; right: [E, J]; target: [E], receivers, ascending, num_nodes of them. Returns [num_nodes, I, J].
    """
    with torch.no_grad():
        count = torch.bincount(target, minlength=num_nodes)
        longest = int(count.max()) if num_nodes else 0
        place = torch.arange(target.numel(), device=target.device) - (count.cumsum(0) - count).index_select(0, target)
        place = target * longest + place
    if num_nodes * longest > MAX_PADDING * target.numel():
        return torch.stack([segment_sum(x.unsqueeze(1) * right, target, num_nodes) for x in left.unbind(1)], 1)
    rows = num_nodes * longest
    left = left.new_zeros(rows, left.shape[1]).index_copy(0, place, left).view(num_nodes, longest, left.shape[1])
    right = right.new_zeros(rows, right.shape[1]).index_copy(0, place, right).view(num_nodes, longest, right.shape[1])
    return torch.bmm(left.transpose(1, 2), right)


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
