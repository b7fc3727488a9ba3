"""Neighbour graphs: one checked contract behind every builder.

Edges run from a neighbour j (source) to a receiver i (target), as in fairchem's ``edge_index = [source, target]``.
The edge vector is ``vec = pos[target] - pos[source] - shift`` with ``shift = offset @ cell``, which is minus fairchem's
``edge_distance_vec`` (docs/network.md, equation 1.1). Importing this module needs torch alone; vesin and fairchem are
imported by the builders that use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_fairchem.neighbors import Candidates, OpenPairs, choose_builder, find_neighbors, open_pairs, read_systems
from e2former_fairchem.segments import Transpose, Transposed, ascending, gather_rows, row_pointer
from e2former_kernels.common.chunks import EdgeList

if TYPE_CHECKING:
    from e2former_fairchem.parallel import Halo, Partition
    from e2former_fairchem.verlet import VerletList

__all__ = ["MIN_DISTANCE", "Graph", "build_graph"]

#: Two atoms closer than this (Å) count as coincident (docs/network.md, equation 2.1).
MIN_DISTANCE = 1e-4

# At most this many atoms or edges are named in an error.
_NAMED = 5


@dataclass
class Graph:
    """Edges of a batch, sorted by receiver, every pair once per periodic image.

    Args:
        source: [E] int64, neighbour j (index of the real atom).
        target: [E] int64, receiver i, ascending; within a receiver the edges are in order of source and offset.
        vec: [E, 3] Å, ``pos[target] - pos[source] - shift``, differentiable in positions and cell.
        offset: [E, 3] int64 lattice offsets n, or None when no edge can leave its cell.
        shift: [E, 3] Å, ``n @ cell``, differentiable in the cell, or None with ``offset``.
        row_ptr: [num_nodes + 1] int64, the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
        cutoff: Å.
        num_nodes: number of receivers: of atoms in the batch, or of this worker's atoms.
        halo: with graph parallelism, the atoms that this worker sees: the graph then counts the worker's own atoms
            first and foreign ones, which only send, after them. None otherwise.
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
    #: CSR by sender, sorted when it is first asked for; None: made here.
    senders: Transposed | None = field(default=None, repr=False, compare=False)
    #: Not 0: whatever is made of the edges may depend on their number alone, for CUDA graphs; see `EdgeList`.
    one_chunk: int = field(default=0, repr=False, compare=False)
    _edge_list: EdgeList | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.senders is None:
            self.senders = Transposed(self.source, self.num_senders)

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

    def total(self, values: Tensor) -> Tensor:
        """Sum over the workers of what each computed of its own receivers; each may go on with it differently."""
        return values if self.halo is None else self.halo.total(values)

    @property
    def source_order(self) -> Tensor:
        """[E] int64: permutation that sorts the edges by source, stable, so receivers ascend within a source."""
        return self.senders.order

    @property
    def source_ptr(self) -> Tensor:
        """[num_senders + 1] int64: the edges of source j are ``source_order[source_ptr[j]:source_ptr[j + 1]]``."""
        return self.senders.pointer

    @property
    def by_target(self) -> Transpose:
        """CSR of the receivers, as `e2former_fairchem.segments` takes it; it does not know ``vec``."""
        return partial(ascending, self.row_ptr)

    @property
    def by_source(self) -> Transpose:
        """Transposed CSR, as `e2former_fairchem.segments` takes it."""
        return self.senders

    def edge_list(self, species: Tensor) -> EdgeList:
        """The edges as the operations take them, the same object for all layers.

        Args:
            species: [num_senders], atomic numbers.
        """
        if self._edge_list is None or self._edge_list.species is not species:
            given = self.source, self.target, self.row_ptr, species, self.senders
            self._edge_list = EdgeList(*given, one_chunk=self.one_chunk)
        return self._edge_list


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
    kept: VerletList | None = None,
) -> Graph:
    """Graph of all pairs with ``max(lower, 1e-4) <= |vec| <= cutoff`` within each system, every image once.

    Edges are found on detached float64 copies, so which pairs are edges does not depend on the dtype, the device or the
    builder; ``vec`` is then taken from ``pos`` and ``cell`` (in float64, rounded once to the dtype of ``pos``), with a
    deterministic gradient of any order. The cost is linear in the number of atoms; small
    batches on CUDA, where the host's launches are the cost, measure all pairs instead. Long: a third is this text.

    Args:
        pos: [N, 3], Å, systems one after the other; need not be wrapped.
        cell: [B, 3, 3], Å, rows are lattice vectors.
        pbc: [B, 3] bool.
        batch: [N] int64, ascending.
        natoms: [B] int64.
        cutoff: Å.
        max_neighbors: keep the nearest so many per receiver (ties: the lower source index, then offset), None for all.
            A truncated graph changes discontinuously and is not symmetric.
        lower: Å; of the long-range graph (docs/network.md, section 2).
        source_mask: [N] bool, atoms that may be sources; of the long-range graph.
        edge_index: [2, E] int64 (source, target), edges given from outside, which are checked, cut at ``cutoff`` and
            sorted instead of searched.
        cell_offsets: [E, 3] beside them, with pos[source] + offset @ cell the neighbour's position.
        builder: a name in `e2former_fairchem.neighbors.BUILDERS`; None chooses by device.
        partition: with graph parallelism, who owns which atom. Every worker searches the whole batch, so that all of
            them find the same errors, and keeps the edges whose receiver it owns.
        kept: a list of an earlier call with this cutoff, which spares the search while atoms are near where they were.
            The graph is the same, edge by edge.

    Raises:
        ValueError: positions or cells that are not finite, coincident atoms, singular periodic cells, given edges that
            are malformed, and a cutoff that is not positive.
    """
    if not cutoff > 0.0:
        raise ValueError(f"cutoff: expected a positive length in Å, got {cutoff}")
    if max_neighbors is not None and max_neighbors < 1:
        raise ValueError(f"max_neighbors: expected a positive integer or None, got {max_neighbors}")
    with torch.autocast(pos.device.type, enabled=False):
        wide = pos.double()
        with torch.no_grad():
            pos64, cell64 = wide.detach(), cell.detach().double()
            limits = {"lower": lower, "source_mask": source_mask, "max_neighbors": max_neighbors}
            graph, candidates = None, None
            if edge_index is not None:
                if not torch.isfinite(pos64).all():
                    _raise_not_finite(pos64, batch, natoms)
                candidates = _given_edges(edge_index, cell_offsets, pbc, batch, pos.shape[0])
            elif kept is not None and (found := kept.look(pos64, cell64, pbc, batch, natoms, cutoff)) is not None:
                candidates, stale = found
                graph = _from_candidates(
                    candidates, False, pos64, cell64, batch, natoms, cutoff, partition=partition, stale=stale, **limits
                )
            if graph is None and edge_index is None:
                systems = read_systems(pos64, cell64, pbc, batch, natoms)
                if not systems.finite:
                    _raise_not_finite(pos64, batch, natoms)
                reach = cutoff if kept is None else cutoff + kept.skin
                name = choose_builder(systems, reach, builder)
                if name == "pairs" and partition is None:
                    graph = _from_pairs(open_pairs(systems, cutoff, MIN_DISTANCE, **limits), systems.pos, cutoff)
                if graph is None:
                    candidates = find_neighbors(systems, reach, name)
                    if kept is not None:
                        candidates = _within(candidates, pos64, cell64, batch, reach)
                        kept.keep(candidates, pos64, cell64, pbc, natoms)
            if graph is None:
                given = edge_index is not None
                graph = _from_candidates(
                    candidates, given, pos64, cell64, batch, natoms, cutoff, partition=partition, **limits
                )
        to_target = graph.own(wide), graph.target, graph.by_target
        to_source = graph.present(wide), graph.source, graph.by_source
        vec = gather_rows(*to_target) - gather_rows(*to_source)
        if graph.offset is not None:
            shift = _shifts(cell.double(), batch, natoms, graph)
            vec = vec - shift
            graph.shift = shift.to(pos.dtype)
        elif cell.requires_grad:
            vec = vec + 0.0 * cell.sum()  # heads that ask for dE/dcell of a molecule get zeros, not an error
        graph.vec = vec.to(pos.dtype)
    return graph


def _from_pairs(found: OpenPairs | None, pos: Tensor, cutoff: float) -> Graph | None:
    """The graph, still without vectors, from all distances at once; None where that does not serve."""
    if found is None:
        return None
    nodes = pos.shape[0]
    # with an order the list is symmetric: every edge is there in both directions, and both pointers are the same
    pointer = None if found.source_order is None else found.row_ptr
    senders = Transposed(found.source, nodes, found.source_order, pointer)
    return Graph(found.source, found.target, pos, None, None, found.row_ptr, float(cutoff), nodes, None, senders)


def _from_candidates(
    candidates: Candidates,
    given: bool,
    pos: Tensor,
    cell: Tensor,
    batch: Tensor,
    natoms: Tensor,
    cutoff: float,
    lower: float,
    source_mask: Tensor | None,
    max_neighbors: int | None,
    partition: Partition | None,
    stale: Tensor | None = None,
) -> Graph | None:
    """The graph, still without vectors: candidates are measured, checked, cut, and sorted where they are not.

    Args: (those that are not here: as for `build_graph`)
        candidates: a builder's, or given edges.
        given: whether candidates come from outside, so that edges may be listed twice and need not have a reverse.
        stale: [] bool, read with the rest; where it is true candidates may be missing, and there is no graph.
    """
    source, target, offset, ordered = candidates
    num_nodes, halo = pos.shape[0], None
    distance = _vectors(pos, cell, batch, source, target, offset).norm(dim=-1)
    keep = distance <= cutoff
    if lower > 0.0:
        keep &= distance >= lower
    if source_mask is not None:
        keep &= source_mask[source]
    # the good path reads the device once: nothing coincides, nothing is cut, and offsets fit a key
    facts = [(distance < MIN_DISTANCE).any(), ~keep.all()]
    if offset is not None and offset.shape[0] and not ordered:
        facts.append(offset.abs().max())
    if stale is not None:
        facts.append(stale)
    coincident, cut, *reach = torch.stack([fact.long() for fact in facts]).tolist()
    if stale is not None and reach.pop():
        return None
    if coincident:
        _raise_coincident(distance, source, target, batch, natoms)
    edges = source, target, distance, offset
    if cut:
        edges = _take(edges, keep)
    if partition is not None:
        if given:  # on every worker alike
            source, target, _, offset = _take(edges, _canonical_order(edges[0], edges[1], edges[3], num_nodes, *reach))
            _check_unique(source, target, offset)
        halo = partition.halo(edges[0], edges[1])
        edges = _take(edges, partition.owner[edges[1]] == partition.rank)
    if not ordered:
        edges = _take(edges, _canonical_order(edges[0], edges[1], edges[3], num_nodes, *reach))
    source, target, distance, offset = edges
    if given:
        _check_unique(source, target, offset)
    if halo is not None:
        source, target, num_nodes = halo.row[source], halo.row[target], halo.own.shape[0]
    row_ptr = row_pointer(target, num_nodes)
    if max_neighbors is not None:
        nearest = _nearest(distance, target, row_ptr, max_neighbors)
        source, target, _, offset = _take((source, target, None, offset), nearest)
        row_ptr = row_pointer(target, num_nodes)
    graph = Graph(source, target, pos, offset, None, row_ptr, float(cutoff), num_nodes, halo)
    if not given and source_mask is None and max_neighbors is None and halo is None:
        # every edge is there in both directions: receivers and senders have the same pointer
        graph.senders = Transposed(source, num_nodes, pointer=row_ptr)
    return graph


def _within(candidates: Candidates, pos: Tensor, cell: Tensor, batch: Tensor, radius: float) -> Candidates:
    """Candidates within a radius (Å), in order."""
    source, target, offset, ordered = candidates
    distance = _vectors(pos, cell, batch, source, target, offset).norm(dim=-1)
    source, target, offset = _take((source, target, offset), distance <= radius)
    if not ordered:
        reach = int(offset.abs().max()) if offset is not None and offset.shape[0] else 0
        source, target, offset = _take(
            (source, target, offset), _canonical_order(source, target, offset, pos.shape[0], reach)
        )
    return Candidates(source, target, offset, True)


def _take(edges: tuple[Tensor | None, ...], which: Tensor) -> tuple[Tensor | None, ...]:
    """Rows of each tensor by a mask (read once for all) or a permutation."""
    index = which.nonzero().squeeze(1) if which.dtype == torch.bool else which
    return tuple(None if values is None else values.index_select(0, index) for values in edges)


def _vectors(pos: Tensor, cell: Tensor, batch: Tensor, source: Tensor, target: Tensor, offset: Tensor | None) -> Tensor:
    vec = pos[target] - pos[source]
    if offset is None:
        return vec
    if cell.shape[0] == 1:
        return vec - offset.to(cell.dtype) @ cell[0]
    return vec - torch.einsum("ek,ekx->ex", offset.to(cell.dtype), cell[batch[target]])


def _shifts(cell: Tensor, batch: Tensor, natoms: Tensor, graph: Graph) -> Tensor:
    """``offset @ cell`` [E, 3] of each edge's system, with a deterministic gradient in the cells."""
    offset = graph.offset
    if cell.shape[0] == 1:
        return offset.to(cell.dtype) @ cell[0]
    if graph.halo is not None:
        batch = batch[graph.halo.own]
        natoms = torch.bincount(batch, minlength=natoms.shape[0])
    node_ptr = torch.cat([natoms.new_zeros(1), natoms.cumsum(0)])
    edge_ptr = graph.row_ptr[node_ptr]
    cells = gather_rows(cell.reshape(-1, 9), batch[graph.target], lambda: (None, edge_ptr)).reshape(-1, 3, 3)
    return (offset.to(cell.dtype).unsqueeze(-1) * cells).sum(dim=1)


def _canonical_order(source: Tensor, target: Tensor, offset: Tensor | None, num_nodes: int, reach: int = 0) -> Tensor:
    """Permutation that sorts by target, then source, then offset: the same for every builder.

    Args:
        source: [E].
        target: [E].
        offset: [E, 3], or None.
        num_nodes: senders and receivers are below it.
        reach: no offset is larger; 0 where that is not known.
    """
    pair = target * max(num_nodes, 1) + source  # at most N^2, exact in int64 up to three billion atoms
    if offset is None or offset.shape[0] == 0:
        return torch.argsort(pair, stable=True)
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
    order = order[torch.argsort(target[order].to(torch.int32), stable=True)]  # half the passes of 64 bits
    rank = torch.arange(order.shape[0], device=order.device) - row_ptr[target[order]]
    keep = torch.empty_like(rank, dtype=torch.bool)
    keep[order] = rank < max_neighbors
    return keep


def _given_edges(
    edge_index: Tensor, cell_offsets: Tensor | None, pbc: Tensor, batch: Tensor, num_nodes: int
) -> Candidates:
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index: expected shape [2, edges], got {tuple(edge_index.shape)}")
    source, target = edge_index[0].to(torch.int64), edge_index[1].to(torch.int64)
    if source.numel():
        low, high = torch.stack(torch.aminmax(edge_index)).tolist()  # before anything is looked up
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index: expected atoms 0 to {num_nodes - 1}, got {low} to {high}")
    apart = batch[source] != batch[target]
    facts = [apart.any(), pbc.any()]
    offset, along_open = None, None
    if cell_offsets is not None and tuple(cell_offsets.shape) == (source.shape[0], 3):
        offset = (cell_offsets.round() if cell_offsets.is_floating_point() else cell_offsets).to(torch.int64)
        along_open = (offset != 0) & ~pbc[batch[target]]
        facts += [along_open.any(), offset.any()]
    joins_structures, periodic, *of_offsets = torch.stack(facts).tolist()
    if joins_structures:
        bad = int(apart.nonzero()[0])
        raise ValueError(
            f"edge_index: edge {bad} joins atom {int(source[bad])} of structure {int(batch[source[bad]])} to atom "
            f"{int(target[bad])} of structure {int(batch[target[bad]])}; expected both in one structure"
        )
    if cell_offsets is None:
        if periodic:
            raise ValueError("cell_offsets: expected [edges, 3] beside edge_index of a periodic system, got None")
        return Candidates(source, target, None)
    if offset is None:
        raise ValueError(f"cell_offsets: expected shape {(source.shape[0], 3)}, got {tuple(cell_offsets.shape)}")
    if of_offsets[0]:
        bad = int(along_open.any(dim=1).nonzero()[0])
        raise ValueError(
            f"cell_offsets: edge {bad} has offset {offset[bad].tolist()} in a system with pbc "
            f"{pbc[batch[target[bad]]].tolist()}; expected 0 along open directions"
        )
    return Candidates(source, target, offset if of_offsets[1] else None)


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


def _raise_not_finite(pos: Tensor, batch: Tensor, natoms: Tensor) -> None:
    finite = torch.isfinite(pos).all(dim=1)
    bad = (~finite).nonzero().squeeze(1)[:_NAMED].tolist()
    named = ", ".join(f"{_name(atom, batch, natoms)} at {pos[atom].tolist()}" for atom in bad)
    raise ValueError(f"positions that are not finite: {named}; {int((~finite).sum())} of {pos.shape[0]} atoms")


def _raise_coincident(distance: Tensor, source: Tensor, target: Tensor, batch: Tensor, natoms: Tensor) -> None:
    close = distance < MIN_DISTANCE
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
