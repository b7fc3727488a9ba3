"""Neighbour search: candidate edges for the graph, from vesin on the CPU and fairchem's builders on CUDA.

Every builder returns all pairs within a slightly enlarged cutoff (plus possibly a few more), in any order; the graph
module measures, filters and orders them. What the builders are given is made harmless first: cells are completed where
a direction is not periodic, a periodic direction that no edge can cross is treated as open (a molecule in the 240 Å box
of ``molecule_cell_size`` costs what the molecule costs), and the builders that need it get wrapped positions, a
right-handed cell and boxes no larger than the atoms.

Small systems on CUDA are bound by the host, which launches kernels and waits for what they find: those take the
distances of all pairs instead of cells and bins (``pairs``), in a few operations. Everything that the host must know of
a batch is read once (`read_systems`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "BUILDERS",
    "MAX_PAIRS",
    "MAX_WITHIN_REACH",
    "Candidates",
    "OpenPairs",
    "Systems",
    "choose_builder",
    "find_neighbors",
    "open_pairs",
    "read_systems",
]

#: Pairs of atoms and images that are measured at once; up to so many the dense search is chosen on CUDA. Near 100
#: bytes each at the peak.
MAX_PAIRS = 4_000_000

#: Pairs of atoms up to which measuring all of them is quicker than vesin: a third of the time for 9 atoms, half for 60.
_FEW_PAIRS = 10_000

#: Atoms and images that may lie around one atom, in the box of the cell's shape about its cutoff (`_check_reach`). Half
#: of them are neighbours (the sphere in its cube), and an edge takes 25 to 53 kB of the reference with the default
#: width and the authors' (2 GB where a cell of 0.2 Å gives an atom 113,000): 512 MiB for each atom.
MAX_WITHIN_REACH = 2 * 2**29 // 2**15

# (source [E], target [E], offset [E, 3]), all int64.
_Found = tuple[Tensor, Tensor, Tensor]

# Heights of a cell below this (Å) make it singular.
_MIN_HEIGHT = 1e-3


class Candidates(NamedTuple):
    """Edges to be measured.

    Args:
        source: [E] int64.
        target: [E] int64.
        offset: [E, 3] int64, or None.
        ordered: whether they come by target, then source, then offset.
    """

    source: Tensor
    target: Tensor
    offset: Tensor | None
    ordered: bool = False


@dataclass
class Systems:
    """A batch as the builders take it: tensors on its device, and what the host knows of it.

    Args:
        pos: [N, 3] Å float64.
        batch: [N] int64.
        natoms: [B] int64.
        given_cell: [B, 3, 3] Å.
        pbc: [B, 3].
        counts: atoms of each system.
        spread: [B, 3] Å, extent of the positions along x, y and z (NaN or infinite where a position is).
        finite: whether all positions are finite.
    """

    pos: Tensor
    batch: Tensor
    natoms: Tensor
    given_cell: np.ndarray
    pbc: np.ndarray
    counts: list[int]
    spread: np.ndarray
    finite: bool

    @cached_property
    def cell(self) -> np.ndarray:
        """Completed, invertible cells [B, 3, 3] Å.

        Raises:
            ValueError: a cell is singular or not finite.
        """
        return _complete_cells(self.given_cell, self.pbc)

    @cached_property
    def inverse(self) -> np.ndarray:
        """Inverse cells [B, 3, 3] 1/Å; fractional coordinates are ``pos @ inverse``."""
        return np.linalg.inv(self.cell)

    @cached_property
    def height(self) -> np.ndarray:
        """[B, 3] Å: distances between opposite faces of the cells."""
        return 1.0 / np.linalg.norm(self.inverse, axis=-2)

    @cached_property
    def extent(self) -> np.ndarray:
        """[B, 3]: upper bound of the extents of the atoms in fractional coordinates."""
        return np.einsum("bx,bxk->bk", self.spread, np.abs(self.inverse))

    def may_cross(self, cutoff: float) -> np.ndarray:
        """[B, 3] periodic directions along which an edge may leave the cell, by an upper bound of the extents."""
        if not self.cell[self.pbc].size:  # looks at the cells, which are checked where nothing is periodic too
            return self.pbc
        return _crossed(self.extent, self.height, self.pbc, cutoff)


def read_systems(pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor, natoms: Tensor) -> Systems:
    """What the host must know of a batch, read from the device in one synchronisation. Nothing is checked yet.

    Args:
        pos: [N, 3] Å float64, systems one after the other, wrapped or not.
        cell: [B, 3, 3] Å float64, rows are lattice vectors.
        pbc: [B, 3] bool.
        batch: [N] int64.
        natoms: [B] int64.
    """
    systems, one = natoms.shape[0], natoms.shape[0] == 1 and pos.shape[0] > 0
    if one:
        low, high = torch.aminmax(pos, dim=0)
    else:
        index = batch.unsqueeze(1).expand(-1, 3)
        low = pos.new_full((systems, 3), torch.inf).scatter_reduce(0, index, pos, "amin")
        high = pos.new_full((systems, 3), -torch.inf).scatter_reduce(0, index, pos, "amax")
    parts = [low.reshape(-1), high.reshape(-1), cell.reshape(-1), pbc.reshape(-1), natoms]
    if not one:
        # a minimum over scattered rows need not keep a NaN
        parts += [torch.stack(torch.aminmax(pos))] if pos.shape[0] else [pos.new_zeros(2)]
    values = torch.cat([part.to(torch.float64) for part in parts]).cpu().numpy()
    low, high, cells, periodic, counts, *rest = np.split(values, np.cumsum([part.numel() for part in parts[:-1]]))
    finite = bool(np.isfinite(rest[0] if rest else values[:6]).all())
    with np.errstate(invalid="ignore"):
        spread = np.where(low <= high, high - low, 0.0).reshape(systems, 3)  # 0 for a system without atoms
    return Systems(
        pos,
        batch,
        natoms,
        cells.reshape(systems, 3, 3),
        periodic.reshape(systems, 3) != 0,
        [int(count) for count in counts],
        spread,
        finite,
    )


def choose_builder(systems: Systems, cutoff: float, builder: str | None = None) -> str:
    """The builder's name, or the one for a batch.

    On the CPU all pairs of a few atoms without images, otherwise vesin; on CUDA all pairs of a small batch, otherwise
    fairchem's version 3, which falls back to version 2 without its library or where its fixed buffer does not suffice.

    Args:
        systems: the batch.
        cutoff: Å.
        builder: a name in `BUILDERS`; None: chosen here.

    Raises:
        ValueError: an unknown builder.
    """
    if builder is not None:
        if builder not in BUILDERS:
            raise ValueError(f"builder: expected one of {sorted(BUILDERS)}, got {builder!r}")
        return builder
    pairs = systems.pos.shape[0] ** 2
    if not systems.pos.is_cuda:
        few = pairs <= _FEW_PAIRS and not systems.may_cross(_enlarged(cutoff)).any()
        return "pairs" if few else "vesin"
    if pairs <= MAX_PAIRS:
        crossed = systems.may_cross(_enlarged(cutoff))
        if crossed.any():
            pairs *= math.prod((2 * _reach(systems, crossed, _enlarged(cutoff)).max(axis=0) + 1).tolist())
    return "pairs" if pairs <= MAX_PAIRS else "fairchem_v3"


def find_neighbors(systems: Systems, cutoff: float, builder: str) -> Candidates:
    """All pairs of atoms of the same system within ``cutoff``, once per periodic image, not yet exact.

    Args:
        systems: the batch.
        cutoff: Å.
        builder: a name in `BUILDERS`.

    Returns:
        Source, target and offset such that pos[source] + offset @ cell is within the cutoff of pos[target]; offset is
        None when no direction is periodic in effect. Pairs beyond the cutoff may be included, none within is missing.

    Raises:
        ValueError: a singular cell, or, before anything is searched, one with too many images (a wrong unit).
    """
    if systems.pos.shape[0] == 0:
        _, nothing = systems.cell, systems.batch.new_zeros(0, dtype=torch.int64)
        return Candidates(nothing, nothing, None, True)
    _check_reach(systems, cutoff)
    return BUILDERS[builder](systems, _enlarged(cutoff))


def _check_reach(systems: Systems, cutoff: float) -> None:
    """Raise ValueError naming the first structure with more than `MAX_WITHIN_REACH` atoms and images around an atom.

    They are counted in the box of the cell's shape about the sphere of the cutoff, atoms spread evenly: along a
    direction that edges cross it is 2 cutoff / height cells wide, so that it counts what is looked at in skewed cells
    too; along another one it holds the atoms' extent at most.
    """
    crossed = systems.may_cross(cutoff)
    if max(systems.counts) <= MAX_WITHIN_REACH and not crossed.any():
        return
    window = 2.0 * cutoff / systems.height
    share = np.where(crossed, window, window / np.maximum(systems.extent, window))
    within = np.array(systems.counts) * share.prod(axis=1)
    if within.max() <= MAX_WITHIN_REACH:
        return
    bad = int(np.flatnonzero(within > MAX_WITHIN_REACH)[0])
    images = math.prod((2 * np.ceil(cutoff / systems.height[bad, crossed[bad]]).astype(int) + 1).tolist())
    lengths, heights, spread = (
        ", ".join(f"{value:.4g}" for value in values)
        for values in (np.linalg.norm(systems.given_cell[bad], axis=1), systems.height[bad], systems.spread[bad])
    )
    raise ValueError(
        f"structure {bad}: expected at most {MAX_WITHIN_REACH:,} atoms and periodic images around an atom (for "
        f"memory), got about {within[bad]:,.0f}: {systems.counts[bad]} atoms that extend {spread} Å, lattice vectors "
        f"of {lengths} Å, heights of the cell {heights} Å, pbc {systems.pbc[bad].tolist()}, cutoff {cutoff:g} Å, "
        f"{images:,} images of the cell within it; are cell and positions in Å, and is a skewed cell reduced?"
    )


def _enlarged(cutoff: float) -> float:
    """Room for the rounding of a builder's own distances: the exact test is the graph's."""
    return cutoff * (1.0 + 1e-6) + 1e-6


class OpenPairs(NamedTuple):
    """Edges of systems whose edges do not leave the cell, exact and in order of target, then source.

    Args:
        source: [E] int64.
        target: [E] int64.
        row_ptr: [N + 1] int64.
        source_order: [E] int64, which sorts the edges by source, or None where the list is not symmetric.
    """

    source: Tensor
    target: Tensor
    row_ptr: Tensor
    source_order: Tensor | None


def open_pairs(
    systems: Systems, cutoff: float, closest: float, lower: float, source_mask: Tensor | None, max_neighbors: int | None
) -> OpenPairs | None:
    """The finished edges of a small batch without images, in one synchronisation.

    Distances are those that the graph measures, of differences of float64 positions.

    Args:
        systems: the batch.
        cutoff: this, lower, source_mask and max_neighbors as for `e2former_fairchem.graph.build_graph`.
        closest: atoms nearer than this (Å) coincide.
        lower: see cutoff.
        source_mask: see cutoff.
        max_neighbors: see cutoff.

    Returns:
        None where atoms coincide, where edges may leave the cell and where the batch is too large: memory is quadratic
        in the atoms.
    """
    atoms = systems.pos.shape[0]
    if not 0 < atoms**2 <= MAX_PAIRS or systems.may_cross(_enlarged(cutoff)).any():
        return None
    apart = systems.pos.unsqueeze(1) - systems.pos
    distance = apart.norm(dim=-1).fill_diagonal_(torch.inf)
    if len(systems.counts) > 1:
        distance.masked_fill_(systems.batch.unsqueeze(1) != systems.batch, torch.inf)
    mask = distance <= cutoff
    chosen = lower > 0.0 or source_mask is not None
    if lower > 0.0:
        mask &= distance >= lower
    if source_mask is not None:
        mask &= source_mask
    if max_neighbors is not None:
        # a stable sort along the row: of equal distances the lower source first
        ranked = distance.masked_fill(~mask, torch.inf) if chosen else distance
        nearest = ranked.sort(dim=1, stable=True).indices[:, :max_neighbors]
        mask &= torch.zeros_like(mask).scatter_(1, nearest, True)
    # rank[i, j]: edges up to and including the pair (i, j) in canonical order; tells all the rest
    rank = mask.view(-1).cumsum(0)
    edges, least = torch.cat([rank[-1:].to(distance.dtype), distance.amin().view(1)]).tolist()
    if least < closest:
        return None
    pair = torch.searchsorted(rank, torch.arange(1, int(edges) + 1, device=rank.device))
    target = pair.div(atoms, rounding_mode="floor")
    source = pair - target * atoms
    row_ptr = pad(rank[atoms - 1 :: atoms], (1, 0))
    order = None
    if not chosen and max_neighbors is None:
        # The list is symmetric, so that its transpose lists the reversed edges in the same order.
        order = rank.index_select(0, torch.add(target, source, alpha=atoms)) - 1
    return OpenPairs(source, target, row_ptr, order)


def _complete_cells(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Cells whose open directions are replaced by unit vectors normal to the periodic ones: always invertible."""
    if not np.isfinite(cell).all():
        bad = int(np.flatnonzero(~np.isfinite(cell).all(axis=(1, 2)))[0])
        raise ValueError(f"cell of structure {bad}: expected finite lattice vectors, got {cell[bad].tolist()}")
    if not pbc.any():
        return np.broadcast_to(np.eye(3), cell.shape)
    complete = cell.copy()
    for b in np.flatnonzero(~pbc.all(axis=1)):
        rank = int(pbc[b].sum())
        normals = np.linalg.svd(cell[b] * pbc[b][:, None])[2][rank:]
        complete[b, ~pbc[b]] = normals
    # A row of the inverse's transpose is a reciprocal vector, 1 / height long.
    with np.errstate(all="ignore"):
        volume = np.abs(np.linalg.det(complete))
        area = np.linalg.norm(np.cross(np.roll(complete, -1, axis=1), np.roll(complete, -2, axis=1)), axis=2)
        height = np.where(area > 0, volume[:, None] / np.where(area > 0, area, 1.0), 0.0)
    singular = (pbc & (height < _MIN_HEIGHT)).any(axis=1)
    if singular.any():
        bad = int(np.flatnonzero(singular)[0])
        raise ValueError(
            f"cell of structure {bad} is singular: pbc is {pbc[bad].tolist()}, so the lattice vectors must be linearly "
            f"independent, got {cell[bad].tolist()}"
        )
    return complete


def _crossed(extent: np.ndarray, height: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """Periodic directions along which an edge can leave the cell.

    An image shifted by n != 0 cells along k lies at least (1 - extent_k) * height_k away, measured along the normal, if
    extent_k is the spread of the atoms in fractional coordinates.

    Args:
        extent: [..., 3].
        height: [..., 3], Å.
        pbc: [..., 3].
        cutoff: Å.
    """
    return pbc & ((1.0 - extent) * height <= cutoff)


def _reach(systems: Systems, directions: np.ndarray, cutoff: float) -> np.ndarray:
    """[B, 3] images to look at on either side along the directions that edges cross, of wrapped positions.

    None along heights above twice the cutoff, where only the nearest image of a pair can be within it: any other is
    half a cell or more away.
    """
    several = directions & (systems.height <= 2.0 * cutoff)
    return np.where(several, np.floor(1.0 + cutoff / systems.height + 1e-9), 0.0).astype(np.int64)


def _pairs(systems: Systems, cutoff: float) -> Candidates:
    """Distances of all pairs and images, in blocks of receivers of at most `MAX_PAIRS`."""
    batch, atoms, several = systems.batch, systems.pos.shape[0], len(systems.counts) > 1
    crossed = systems.may_cross(cutoff)
    if crossed.any():
        fractional, _, extent = _fractional(systems)
        crossed = _crossed(extent, systems.height, systems.pbc, cutoff)
    periodic = bool(crossed.any())
    images = np.zeros((1, 3), dtype=np.int64)
    if periodic:
        reach = _reach(systems, crossed, cutoff)
        # one array of images for all systems, some of which have fewer
        most = reach.max(axis=0)
        images = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in most), indexing="ij"), -1).reshape(-1, 3)
        allowed = _on(batch, (np.abs(images) <= reach[:, None]).all(axis=2))
        nearest = _on(fractional, crossed & (reach == 0))[batch].unsqueeze(1)  # directions of one image
        wrap = torch.where(_on(batch, reach > 0)[batch], fractional.floor(), 0.0)
        inside, cell = fractional - wrap, _on(fractional, systems.cell)[batch]
        images = _on(fractional, images)
    found = []
    rows = max(MAX_PAIRS // (atoms * len(images)), 1)
    for start in range(0, atoms, rows):
        here = slice(start, start + rows)
        if periodic:
            apart = inside[here].unsqueeze(1) - inside
            apart -= apart.round() * nearest[here]
            apart = (apart.unsqueeze(2) - images).reshape(apart.shape[0], -1, 3).bmm(cell[here])
        else:
            apart = systems.pos[here].unsqueeze(1) - systems.pos
        distance = apart.norm(dim=-1).view(-1, atoms, len(images))
        distance[:, here, len(images) // 2].fill_diagonal_(torch.inf)
        mask = distance <= cutoff
        if several:
            mask &= (batch[here].unsqueeze(1) == batch).unsqueeze(2)
            if periodic:
                mask &= allowed[batch[here]].unsqueeze(1)
        pairs = mask.nonzero()
        pairs[:, 0] += start
        found.append(pairs)
    target, source, image = torch.cat(found).T.contiguous()
    if not periodic:
        return Candidates(source, target, None, True)
    offset = images[image] + (wrap[target] - wrap[source]).to(torch.int64)
    offset += ((inside[target] - inside[source]).round() * nearest.squeeze(1)[target]).to(torch.int64)
    return Candidates(source, target, offset, True)


def _vesin(systems: Systems, cutoff: float) -> Candidates:
    from vesin import NeighborList

    pos, cell, counts = systems.pos, systems.cell, systems.counts
    points, periodic = pos.cpu().numpy(), systems.pbc
    search = NeighborList(cutoff=cutoff, full_list=True, n_threads=torch.get_num_threads())
    pairs, offsets, crossing, start = [], [], False, 0
    for b, count in enumerate(counts):
        here = points[start : start + count]
        directions = periodic[b]
        if count and directions.any():
            fractional = here @ systems.inverse[b]
            extent = fractional.max(axis=0) - fractional.min(axis=0)
            directions = _crossed(extent, systems.height[b], directions, cutoff)
        if count > 1 or directions.any():
            pair, offset = search.compute(points=here, box=cell[b], periodic=directions, quantities="PS")
            pairs.append(pair.astype(np.int64) + start)
            offsets.append(offset)
            crossing = crossing or bool(directions.any())
        start += count
    pair = np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)
    target, source = (torch.from_numpy(np.ascontiguousarray(pair[:, k])).to(pos.device) for k in (0, 1))
    if not crossing:
        return Candidates(source, target, None)
    return Candidates(source, target, _on(pos, np.concatenate(offsets).astype(np.int64)))


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(like.device, non_blocking=True)


def _fractional(systems: Systems) -> tuple[Tensor, Tensor, np.ndarray]:
    """Fractional coordinates [N, 3], the least of each system [B, 3] and, on the host, their extent [B, 3]."""
    pos, batch, count = systems.pos, systems.batch, len(systems.counts)
    inverse = _on(pos, systems.inverse)
    fractional = torch.bmm(pos.unsqueeze(1), inverse[batch]).squeeze(1)
    index = batch.unsqueeze(1).expand(-1, 3)
    low = fractional.new_full((count, 3), torch.inf).scatter_reduce(0, index, fractional, "amin")
    high = fractional.new_full((count, 3), -torch.inf).scatter_reduce(0, index, fractional, "amax")
    extent = (high - low).cpu().numpy()
    extent[~np.isfinite(extent)] = 0.0  # a system without atoms
    return fractional, low, extent


def _fairchem(systems: Systems, cutoff: float, run: Callable[..., _Found]) -> Candidates:
    """Give fairchem's builder a tight box: atoms inside, right-handed, open directions just wide enough."""
    cell, natoms, batch = systems.cell, systems.natoms, systems.batch
    fractional, low, extent = _fractional(systems)
    directions = _crossed(extent, systems.height, systems.pbc, cutoff)

    # Open directions: a box of the atoms' extent and a margin, so that no fractional coordinate leaves [0, 1).
    length = np.where(directions, 1.0, extent + cutoff / systems.height)
    box = cell * length[:, :, None]
    mirror = np.where(np.linalg.det(box) < 0, -1.0, 1.0)
    box[:, :, 0] *= mirror[:, None]
    box, periodic = _on(low, box), _on(low, directions)
    wrap = torch.where(periodic[batch], fractional.floor(), torch.zeros_like(fractional))
    inside = torch.where(periodic[batch], fractional - wrap, fractional - low[batch])
    rounded_up = periodic[batch] & (inside >= 1.0)  # a coordinate of -1e-17 wraps to 1.0
    wrap, inside = wrap + rounded_up, torch.where(rounded_up, torch.zeros_like(inside), inside)
    inside = inside / _on(low, length)[batch]
    placed = torch.bmm(inside.unsqueeze(1), box[batch]).squeeze(1)

    source, target, offset = run(placed, box, periodic, batch, natoms, cutoff)
    if not directions.any():
        return Candidates(source, target, None)
    wrap = wrap.to(torch.int64)
    return Candidates(source, target, offset + wrap[target] - wrap[source])


def _fairchem_v2(systems: Systems, cutoff: float) -> Candidates:
    return _fairchem(systems, cutoff, _run_v2)


def _fairchem_v3(systems: Systems, cutoff: float) -> Candidates:
    from fairchem.core.graph.radius_graph_pbc_nvidia import nvalchemiops_installed

    return _fairchem(systems, cutoff, _run_v3 if nvalchemiops_installed() else _run_v2)


def _run_v2(pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor, natoms: Tensor, cutoff: float) -> _Found:
    from fairchem.core.graph.radius_graph_pbc import radius_graph_pbc_v2

    data = SimpleNamespace(pos=pos, cell=cell, pbc=pbc, batch=batch, natoms=natoms)
    (source, target), offset, _ = radius_graph_pbc_v2(data, cutoff, max_num_neighbors_threshold=0)
    source, target, offset = source.to(torch.int64), target.to(torch.int64), offset.round().to(torch.int64)
    # Version 2 drops pairs at distance zero, which the graph must report.
    rows = torch.cat([batch.to(pos.dtype).unsqueeze(1), pos], dim=1)
    unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
    if unique.shape[0] < pos.shape[0]:
        order = torch.argsort(inverse, stable=True)
        same = (inverse[order][1:] == inverse[order][:-1]).nonzero().squeeze(1)
        source, target = torch.cat([source, order[same]]), torch.cat([target, order[same + 1]])
        offset = torch.cat([offset, offset.new_zeros((same.shape[0], 3))])
    return source, target, offset


def _run_v3(pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor, natoms: Tensor, cutoff: float) -> _Found:
    from fairchem.core.graph.radius_graph_pbc_nvidia import get_neighbors_nvidia

    # fairchem sizes the buffer by the cutoff alone; an atom that fills it may have lost neighbours.
    buffer = _buffer_of_v3(cutoff)
    target, source, offset, _ = get_neighbors_nvidia(
        pos, cell, pbc, cutoff, max_neigh=buffer, method="cell_list", batch=batch, natoms=natoms
    )
    if target.numel() and int(torch.bincount(target, minlength=1).max()) >= buffer:
        _log_once(f"An atom has {buffer} neighbours or more, all that fairchem's version 3 can hold: using version 2.")
        return _run_v2(pos, cell, pbc, batch, natoms, cutoff)
    return source.to(torch.int64), target.to(torch.int64), offset.to(torch.int64)


@lru_cache(maxsize=16)
def _buffer_of_v3(cutoff: float) -> int:
    """Neighbours per atom that fairchem's version 3 has room for."""
    from fairchem.core.graph.radius_graph_pbc_nvidia import estimate_max_neighbors

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the argument, which fairchem passes too
        return estimate_max_neighbors(cutoff=cutoff, safety_factor=2.0)


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logging.info(message)


#: Neighbour searches by name; all give the same graph.
BUILDERS: dict[str, Callable[[Systems, float], Candidates]] = {
    "pairs": _pairs,
    "vesin": _vesin,
    "fairchem_v2": _fairchem_v2,
    "fairchem_v3": _fairchem_v3,
}
