"""Neighbour graphs: one checked contract behind every builder.

Edges run from a neighbour j (source) to a receiver i (target), as in fairchem's ``edge_index = [source, target]``.
The edge vector is ``vec = pos[target] - pos[source] - shift`` with ``shift = offset @ cell``, which is minus fairchem's
``edge_distance_vec``. This module needs torch alone; vesin and fairchem are imported by the builders that use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["MIN_DISTANCE", "Graph"]

#: Two atoms closer than this (Å) count as coincident (SPEC 2).
MIN_DISTANCE = 1e-4


@dataclass
class Graph:
    """Edges of a batch, sorted by receiver, every pair once per periodic image.

    source: [E] int64, neighbour j (index of the real atom). target: [E] int64, receiver i, ascending.
    vec: [E, 3] Å, ``pos[target] - pos[source] - shift``, differentiable in positions and cell.
    offset: [E, 3] int64 lattice offsets n, or None when no edge crosses a cell boundary.
    shift: [E, 3] Å, ``n @ cell``, differentiable in the cell, or None with ``offset``.
    row_ptr: [num_nodes + 1] int64, the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
    cutoff: Å. num_nodes: number of atoms in the batch.
    """

    source: Tensor
    target: Tensor
    vec: Tensor
    offset: Tensor | None
    shift: Tensor | None
    row_ptr: Tensor
    cutoff: float
    num_nodes: int
    _source_order: Tensor | None = field(default=None, repr=False, compare=False)
    _source_ptr: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return self.source.shape[0]

    @property
    def source_order(self) -> Tensor:
        """[E] int64: permutation that sorts the edges by source, stable, so receivers ascend within a source."""
        if self._source_order is None:
            self._source_order = torch.argsort(self.source, stable=True)
        return self._source_order

    @property
    def source_ptr(self) -> Tensor:
        """[num_nodes + 1] int64: the edges of source j are ``source_order[source_ptr[j]:source_ptr[j + 1]]``."""
        if self._source_ptr is None:
            self._source_ptr = csr_pointer(self.source, self.num_nodes)
        return self._source_ptr


def csr_pointer(index: Tensor, num_rows: int) -> Tensor:
    """Row pointer [num_rows + 1] int64 of the entries of ``index`` [E] int64 counted per row."""
    counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=index.device)
    counts.index_add_(0, index + 1, torch.ones_like(index))
    return counts.cumsum(0)
