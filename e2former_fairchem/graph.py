"""Neighbour graphs: one checked contract behind every builder.

Edges run from a neighbour j (source) to a receiver i (target), as in fairchem's ``edge_index = [source, target]``.
The edge vector is ``vec = pos[target] - pos[source] - shift`` with ``shift = offset @ cell``, which is minus fairchem's
``edge_distance_vec`` (SPEC 2). Importing this module needs torch alone; vesin and fairchem are imported by the builders
that use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_fairchem.neighbors import find_neighbors
from e2former_fairchem.segments import gather_rows

if TYPE_CHECKING:
    from e2former_fairchem.parallel import Halo, Partition

__all__ = ["MIN_DISTANCE", "Graph", "build_graph"]

#: Two atoms closer than this (Å) count as coincident (SPEC 2).
MIN_DISTANCE = 1e-4

# At most this many atoms or edges are named in an error.
_NAMED = 5


@dataclass
class Graph:
    """Edges of a batch, sorted by receiver, every pair once per periodic image.

    source: [E] int64, neighbour j (index of the real atom). target: [E] int64, receiver i, ascending; within a receiver
    the edges are in order of source and offset.
    vec: [E, 3] Å, ``pos[target] - pos[source] - shift``, differentiable in positions and cell.
    offset: [E, 3] int64 lattice offsets n, or None when no edge can leave its cell.
    shift: [E, 3] Å, ``n @ cell``, differentiable in the cell, or None with ``offset``.
    row_ptr: [num_nodes + 1] int64, the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
    cutoff: Å. num_nodes: number of receivers: of atoms in the batch, or of this worker's atoms.
    halo: with graph parallelism, the atoms that this worker sees: the graph then counts the worker's own atoms first
    and foreign ones, which only send, after them. None otherwise.
    """

    source: Tensor
    target: Tensor
    vec: Tensor
    offset: Tensor | None
    shift: Tensor | None
    row_ptr: Tensor
    cutoff: float
    num_nodes: int
    halo: Halo | None = None
    _source_order: Tensor | None = field(default=None, repr=False, compare=False)
    _source_ptr: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return self.source.shape[0]

    @property
    def num_senders(self) -> int:
        """Number of atoms that ``source`` counts, at least ``num_nodes``."""
        return self.num_nodes if self.halo is None else self.halo.present.shape[0]

    def with_vec(self, vec: Tensor) -> Graph:
        """The same edges with other edge vectors."""
        return replace(self, vec=vec)

    def own(self, values: Tensor) -> Tensor:
        """Rows of the receivers, from rows of all atoms of the batch."""
        return values if self.halo is None else values.index_select(0, self.halo.own)

    def present(self, values: Tensor) -> Tensor:
        """Rows of the senders, from rows of all atoms of the batch."""
        return values if self.halo is None else values.index_select(0, self.halo.present)

    def fetch(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows of the senders, from rows of the receivers that each worker computed: one exchange for all tensors."""
        return tensors if self.halo is None else self.halo.fetch(*tensors)

    @property
    def source_order(self) -> Tensor:
        """[E] int64: permutation that sorts the edges by source, stable, so receivers ascend within a source."""
        if self._source_order is None:
            self._source_order = torch.argsort(self.source, stable=True)
        return self._source_order

    @property
    def source_ptr(self) -> Tensor:
        """[num_senders + 1] int64: the edges of source j are ``source_order[source_ptr[j]:source_ptr[j + 1]]``."""
        if self._source_ptr is None:
            self._source_ptr = _pointer(self.source[self.source_order], self.num_senders)
        return self._source_ptr

    def by_target(self) -> tuple[None, Tensor]:
        """CSR of the receivers, in the form `e2former_fairchem.segments` takes."""
        return None, self.row_ptr

    def by_source(self) -> tuple[Tensor, Tensor]:
        """Transposed CSR, in the form `e2former_fairchem.segments` takes."""
        return self.source_order, self.source_ptr


@torch.compiler.disable
def build_graph(
    pos: Tensor,
    cell: Tensor,
    pbc: Tensor,
    batch: Tensor,
    natoms: Tensor,
    cutoff: float,
    max_neighbors: int | None = None,
    *,
    lower: float = 0.0,
    source_mask: Tensor | None = None,
    edge_index: Tensor | None = None,
    cell_offsets: Tensor | None = None,
    builder: str | None = None,
    partition: Partition | None = None,
) -> Graph:
    """Graph of all pairs with ``max(lower, 1e-4) <= |vec| <= cutoff`` within each system, every image once.

    Edges are found on detached float64 copies, so which pairs are edges does not depend on the dtype, the device or the
    builder; ``vec`` is then taken from ``pos`` and ``cell`` (in float64, rounded once to the dtype of ``pos``), with a
    deterministic gradient of any order. The cost is linear in the number of atoms.

    pos: [N, 3] Å, systems one after the other; need not be wrapped. cell: [B, 3, 3] Å, rows are lattice vectors.
    pbc: [B, 3] bool. batch: [N] int64, ascending. natoms: [B] int64.
    max_neighbors: keep the nearest so many per receiver (ties: the lower source index, then offset), None for all. A
    truncated graph changes discontinuously and is not symmetric.
    lower: Å; source_mask: [N] bool, atoms that may be sources (the long-range graph of SPEC 7).
    edge_index: [2, E] int64 (source, target) and cell_offsets: [E, 3] with pos[source] + offset @ cell the neighbour's
    position: edges given from outside, which are checked, cut at ``cutoff`` and sorted instead of searched.
    builder: a name in `e2former_fairchem.neighbors.BUILDERS`; None chooses by device.
    partition: with graph parallelism, who owns which atom. Every worker searches the whole batch, so that all of them
    find the same errors, and keeps the edges whose receiver it owns.
    Raises ValueError for positions or cells that are not finite, coincident atoms, singular periodic cells, given
    edges that are malformed, and a cutoff that is not positive.
    """
    if not cutoff > 0.0:
        raise ValueError(f"cutoff: expected a positive length in Å, got {cutoff}")
    if max_neighbors is not None and max_neighbors < 1:
        raise ValueError(f"max_neighbors: expected a positive integer or None, got {max_neighbors}")
    num_nodes, halo = pos.shape[0], None
    with torch.autocast(pos.device.type, enabled=False):
        with torch.no_grad():
            pos64, cell64 = pos.detach().double(), cell.detach().double()
            _check_finite(pos64, batch, natoms)
            if edge_index is None:
                source, target, offset = find_neighbors(pos64, cell64, pbc, natoms, cutoff, builder)
            else:
                source, target, offset = _given_edges(edge_index, cell_offsets, pbc, batch, num_nodes)
            distance = _vectors(pos64, cell64, batch, source, target, offset).norm(dim=-1)
            _check_coincident(distance, source, target, batch, natoms)
            keep = distance <= cutoff
            if lower > 0.0:
                keep &= distance >= lower
            if source_mask is not None:
                keep &= source_mask[source]
            source, target, distance = source[keep], target[keep], distance[keep]
            offset = None if offset is None else offset[keep]
            if partition is not None:
                if edge_index is not None:  # on every worker alike
                    order = _canonical_order(source, target, offset, num_nodes)
                    _check_unique(source[order], target[order], None if offset is None else offset[order])
                halo = partition.halo(source, target)
                mine = partition.owner[target] == partition.rank
                source, target, distance = source[mine], target[mine], distance[mine]
                offset = None if offset is None else offset[mine]
            order = _canonical_order(source, target, offset, num_nodes)
            source, target = source[order], target[order]
            offset = None if offset is None else offset[order]
            if edge_index is not None:
                _check_unique(source, target, offset)
            if halo is not None:
                source, target, num_nodes = halo.row[source], halo.row[target], halo.own.shape[0]
                batch = batch[halo.own]
                natoms = torch.bincount(batch, minlength=natoms.shape[0])
            row_ptr = _pointer(target, num_nodes)
            if max_neighbors is not None:
                nearest = _nearest(distance[order], target, row_ptr, max_neighbors)
                source, target = source[nearest], target[nearest]
                offset = None if offset is None else offset[nearest]
                row_ptr = _pointer(target, num_nodes)
        graph = Graph(source, target, pos, offset, None, row_ptr, float(cutoff), num_nodes, halo)
        wide = graph.present(pos.double())
        receivers = wide if halo is None else wide[:num_nodes]
        vec = gather_rows(receivers, target, graph.by_target) - gather_rows(wide, source, graph.by_source)
        if offset is not None:
            shift = _shifts(cell.double(), offset, batch, natoms, graph)
            vec = vec - shift
            graph.shift = shift.to(pos.dtype)
        elif cell.requires_grad:
            vec = vec + 0.0 * cell.sum()  # heads that ask for dE/dcell of a molecule get zeros, not an error
        graph.vec = vec.to(pos.dtype)
    return graph


def _pointer(ascending: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(rows + 1, device=ascending.device))


def _vectors(pos: Tensor, cell: Tensor, batch: Tensor, source: Tensor, target: Tensor, offset: Tensor | None) -> Tensor:
    vec = pos[target] - pos[source]
    if offset is None:
        return vec
    if cell.shape[0] == 1:
        return vec - offset.to(cell.dtype) @ cell[0]
    return vec - torch.einsum("ek,ekx->ex", offset.to(cell.dtype), cell[batch[target]])


def _shifts(cell: Tensor, offset: Tensor, batch: Tensor, natoms: Tensor, graph: Graph) -> Tensor:
    """``offset @ cell`` [E, 3] of each edge's system, with a deterministic gradient in the cells."""
    if cell.shape[0] == 1:
        return offset.to(cell.dtype) @ cell[0]
    node_ptr = torch.cat([natoms.new_zeros(1), natoms.cumsum(0)])
    edge_ptr = graph.row_ptr[node_ptr]
    cells = gather_rows(cell.reshape(-1, 9), batch[graph.target], lambda: (None, edge_ptr)).reshape(-1, 3, 3)
    return (offset.to(cell.dtype).unsqueeze(-1) * cells).sum(dim=1)


def _canonical_order(source: Tensor, target: Tensor, offset: Tensor | None, num_nodes: int) -> Tensor:
    """Permutation that sorts by target, then source, then offset: the same for every builder."""
    pair = target * max(num_nodes, 1) + source  # at most N^2, exact in int64 up to three billion atoms
    if offset is None or offset.shape[0] == 0:
        return torch.argsort(pair, stable=True)
    reach = int(offset.abs().max())
    base = 2 * reach + 1
    code = ((offset[:, 0] + reach) * base + offset[:, 1] + reach) * base + offset[:, 2] + reach
    if base**3 < 2**62 // max(num_nodes, 1) ** 2:
        return torch.argsort(pair * base**3 + code, stable=True)
    order = torch.arange(source.shape[0], device=source.device)
    for key in (offset[:, 2], offset[:, 1], offset[:, 0], pair):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _nearest(distance: Tensor, target: Tensor, row_ptr: Tensor, max_neighbors: int) -> Tensor:
    """[E] bool: the ``max_neighbors`` shortest edges of each receiver; edges come in canonical order."""
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(target[order], stable=True)]
    rank = torch.arange(order.shape[0], device=order.device) - row_ptr[target[order]]
    keep = torch.empty_like(rank, dtype=torch.bool)
    keep[order] = rank < max_neighbors
    return keep


def _given_edges(
    edge_index: Tensor, cell_offsets: Tensor | None, pbc: Tensor, batch: Tensor, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index: expected shape [2, edges], got {tuple(edge_index.shape)}")
    source, target = edge_index[0].to(torch.int64), edge_index[1].to(torch.int64)
    if source.numel() and (int(edge_index.min()) < 0 or int(edge_index.max()) >= num_nodes):
        raise ValueError(
            f"edge_index: expected atoms 0 to {num_nodes - 1}, got {int(edge_index.min())} to {int(edge_index.max())}"
        )
    if bool((batch[source] != batch[target]).any()):
        bad = int((batch[source] != batch[target]).nonzero()[0])
        raise ValueError(
            f"edge_index: edge {bad} joins atom {int(source[bad])} of structure {int(batch[source[bad]])} to atom "
            f"{int(target[bad])} of structure {int(batch[target[bad]])}; expected both in one structure"
        )
    if cell_offsets is None:
        if bool(pbc.any()):
            raise ValueError("cell_offsets: expected [edges, 3] beside edge_index of a periodic system, got None")
        return source, target, None
    if tuple(cell_offsets.shape) != (source.shape[0], 3):
        raise ValueError(f"cell_offsets: expected shape {(source.shape[0], 3)}, got {tuple(cell_offsets.shape)}")
    offset = cell_offsets.round().to(torch.int64) if cell_offsets.is_floating_point() else cell_offsets.to(torch.int64)
    if bool(((offset != 0) & ~pbc[batch[target]]).any()):
        bad = int(((offset != 0) & ~pbc[batch[target]]).any(dim=1).nonzero()[0])
        raise ValueError(
            f"cell_offsets: edge {bad} has offset {offset[bad].tolist()} in a system with pbc "
            f"{pbc[batch[target[bad]]].tolist()}; expected 0 along open directions"
        )
    return source, target, offset if bool(offset.any()) else None


def _check_unique(source: Tensor, target: Tensor, offset: Tensor | None) -> None:
    same = (source[1:] == source[:-1]) & (target[1:] == target[:-1])
    if offset is not None:
        same &= (offset[1:] == offset[:-1]).all(dim=1)
    if bool(same.any()):
        bad = int(same.nonzero()[0])
        raise ValueError(
            f"edge_index: the edge from atom {int(source[bad])} to atom {int(target[bad])} is listed twice"
            + ("" if offset is None else f" with offset {offset[bad].tolist()}")
        )


def _check_finite(pos: Tensor, batch: Tensor, natoms: Tensor) -> None:
    finite = torch.isfinite(pos).all(dim=1)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero().squeeze(1)[:_NAMED].tolist()
    named = ", ".join(f"{_name(atom, batch, natoms)} at {pos[atom].tolist()}" for atom in bad)
    raise ValueError(f"positions that are not finite: {named}; {int((~finite).sum())} of {pos.shape[0]} atoms")


def _check_coincident(distance: Tensor, source: Tensor, target: Tensor, batch: Tensor, natoms: Tensor) -> None:
    close = distance < MIN_DISTANCE
    if not bool(close.any()):
        return
    edges = (close & (source <= target)).nonzero().squeeze(1)
    edges = edges if edges.numel() else close.nonzero().squeeze(1)
    named = "; ".join(
        f"{_name(int(source[e]), batch, natoms)} and {_name(int(target[e]), batch, natoms)}, {float(distance[e]):.2e} Å"
        for e in edges[:_NAMED].tolist()
    )
    raise ValueError(f"coincident atoms (or images of atoms), expected at least {MIN_DISTANCE} Å between two: {named}")


def _name(atom: int, batch: Tensor, natoms: Tensor) -> str:
    system = int(batch[atom])
    local = atom - int(natoms[:system].sum())
    return f"atom {atom} (atom {local} of structure {system})"
