"""Atoms in an order in which neighbours stand close together, so that kernels find their rows in the cache.

The kernels work through the atoms in order, many at a time, and read the rows of their neighbours. Files of molecular
dynamics mostly list atoms molecule by molecule, which is good enough; a list in random order makes the attention slower
by half. The trunk then works in the order of a space-filling curve, and its caller never sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from e2former_fairchem.graph import Graph

__all__ = ["SpatialOrder", "spatial_order"]

#: With fewer atoms everything is in the cache.
MIN_ATOMS = 4096
#: Mean distance of neighbours in the list, as a share of the list, from which another order pays. In random order it is
#: a third, on a lattice row by row some hundredths.
MIN_SPREAD = 0.1
#: Side of the curve's cells, Å; 2^10 of them along each axis before it repeats.
CELL = 4.0
_BITS = 10


@dataclass(frozen=True)
class SpatialOrder:
    """A permutation of a graph's atoms.

    Args:
        order: [N], the atom at each new place.
        place: [N], its inverse.
    """

    order: Tensor
    place: Tensor

    def atoms(self, values: Tensor) -> Tensor:
        """Rows of atoms [N, ...], without gradients, in the new order."""
        return values.index_select(0, self.order)

    def back(self, values: Tensor) -> Tensor:
        """Rows of atoms [N, ...] in the caller's order, differentiable."""
        return values.index_select(0, self.place)

    def graph(self, graph: Graph) -> Graph:
        """The graph with its receivers in the new order, edges of a receiver as before; differentiable in ``vec``."""
        edges, device = graph.num_edges, graph.source.device
        degree = (graph.row_ptr[1:] - graph.row_ptr[:-1]).index_select(0, self.order)
        row_ptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
        shift = graph.row_ptr[:-1].index_select(0, self.order) - row_ptr[:-1]
        number = torch.arange(edges, device=device)
        edge = torch.repeat_interleave(shift, degree, output_size=edges) + number
        target = torch.repeat_interleave(torch.arange(degree.shape[0], device=device), degree, output_size=edges)
        source = self.place.index_select(0, graph.source.index_select(0, edge))
        vec = graph.vec.index_select(0, edge)  # every edge once: its gradient is a sum of one term
        return replace(
            graph,
            source=source,
            target=target,
            vec=vec,
            row_ptr=row_ptr,
            offset=None,
            shift=None,
            senders=None,
            _edge_list=None,
        )


@torch.no_grad()
def spatial_order(pos: Tensor | None, batch: Tensor, graph: Graph) -> SpatialOrder | None:
    """The order along a Morton curve within each system, or None where the atoms' own order is as good.

    Args:
        pos: [N, 3], Å, or None where they are not known.
        batch: [N], ascending.
        graph: of the atoms.
    """
    atoms = batch.shape[0]
    if pos is None or atoms < MIN_ATOMS or graph.num_edges == 0 or graph.halo is not None:
        return None
    if float((graph.source - graph.target).abs().sum()) < MIN_SPREAD * atoms * graph.num_edges:
        return None
    cell = ((pos - pos.amin(0)) / CELL).long() & ((1 << _BITS) - 1)
    code = batch
    for bit in reversed(range(_BITS)):
        for axis in range(3):
            code = code << 1 | (cell[:, axis] >> bit & 1)
    order = torch.argsort(code, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(atoms, device=order.device)
    return SpatialOrder(order, place)
