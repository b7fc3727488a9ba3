"""Neighbour search: candidate edges for the graph, from vesin on the CPU and fairchem's builders on CUDA.

Every builder returns all pairs within a slightly enlarged cutoff (plus possibly a few more), in any order; the graph
module measures, filters and orders them. What the builders are given is made harmless first: cells are completed where
a direction is not periodic, a periodic direction that no edge can cross is treated as open (a molecule in the 240 Å box
of ``molecule_cell_size`` costs what the molecule costs), and the builders that need it get wrapped positions, a
right-handed cell and boxes no larger than the atoms.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

__all__ = ["BUILDERS", "find_neighbors"]

# (source [E], target [E], offset [E, 3] or None), all int64.
Candidates = tuple[Tensor, Tensor, Tensor | None]

# Heights of a cell below this (Å) make it singular.
_MIN_HEIGHT = 1e-3


def find_neighbors(
    pos: Tensor, cell: Tensor, pbc: Tensor, natoms: Tensor, cutoff: float, builder: str | None = None
) -> Candidates:
    """All pairs of atoms of the same system within ``cutoff``, once per periodic image, unordered and not yet exact.

    pos: [N, 3] Å float64, systems one after the other, wrapped or not. cell: [B, 3, 3] Å float64, rows are lattice
    vectors. pbc: [B, 3] bool. natoms: [B] int64. cutoff: Å.
    builder: a name in `BUILDERS`, or None to choose: vesin on the CPU, fairchem's version 3 on CUDA where its library
    is installed and its fixed buffer suffices, version 2 otherwise.
    Returns source, target and offset such that pos[source] + offset @ cell is within the cutoff of pos[target]; offset
    is None when no direction is periodic in effect. Pairs beyond the cutoff may be included, none within is missing.
    Raises ValueError for a singular cell and for an unknown builder.
    """
    if builder is not None and builder not in BUILDERS:
        raise ValueError(f"builder: expected one of {sorted(BUILDERS)}, got {builder!r}")
    counts = natoms.tolist()
    complete = _complete_cells(cell.cpu().numpy(), pbc.cpu().numpy())
    # Room for the rounding of a builder's own distances: the exact test is ours.
    enlarged = cutoff * (1.0 + 1e-6) + 1e-6
    name = builder or ("fairchem_v3" if pos.is_cuda else "vesin")
    return BUILDERS[name](pos, complete, pbc, counts, enlarged)


def _complete_cells(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Cells whose open directions are replaced by unit vectors normal to the periodic ones: always invertible."""
    if not np.isfinite(cell).all():
        bad = int(np.flatnonzero(~np.isfinite(cell).all(axis=(1, 2)))[0])
        raise ValueError(f"cell of structure {bad}: expected finite lattice vectors, got {cell[bad].tolist()}")
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


def _crossed(extent: np.ndarray, inverse: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """Periodic directions along which an edge can leave the cell.

    An image shifted by n != 0 cells along k lies at least (1 - extent_k) * height_k away, measured along the normal, if
    extent_k is the spread of the atoms in fractional coordinates. extent [..., 3], inverse [..., 3, 3], pbc [..., 3].
    """
    height = 1.0 / np.linalg.norm(inverse, axis=-2)
    return pbc & ((1.0 - extent) * height <= cutoff)


def _vesin(pos: Tensor, cell: np.ndarray, pbc: Tensor, counts: list[int], cutoff: float) -> Candidates:
    from vesin import NeighborList

    points, periodic = pos.cpu().numpy(), pbc.cpu().numpy()
    search = NeighborList(cutoff=cutoff, full_list=True, n_threads=torch.get_num_threads())
    pairs, offsets, crossing, start = [], [], False, 0
    for b, count in enumerate(counts):
        here = points[start : start + count]
        directions = periodic[b]
        if count and directions.any():
            inverse = np.linalg.inv(cell[b])
            fractional = here @ inverse
            extent = fractional.max(axis=0) - fractional.min(axis=0)
            directions = _crossed(extent, inverse, directions, cutoff)
        if count > 1 or directions.any():
            pair, offset = search.compute(points=here, box=cell[b], periodic=directions, quantities="PS")
            pairs.append(pair.astype(np.int64) + start)
            offsets.append(offset)
            crossing = crossing or bool(directions.any())
        start += count
    pair = np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)
    target, source = (torch.from_numpy(np.ascontiguousarray(pair[:, k])).to(pos.device) for k in (0, 1))
    if not crossing:
        return source, target, None
    return source, target, torch.from_numpy(np.concatenate(offsets).astype(np.int64)).to(pos.device)


def _fairchem(
    pos: Tensor, cell: np.ndarray, pbc: Tensor, counts: list[int], cutoff: float, run: Callable[..., Candidates]
) -> Candidates:
    """Give fairchem's builder a tight box: atoms inside, right-handed, open directions just wide enough."""
    device, systems = pos.device, len(counts)
    natoms = torch.tensor(counts, device=device)
    batch = torch.repeat_interleave(torch.arange(systems, device=device), natoms, output_size=pos.shape[0])
    inverse = np.linalg.inv(cell)
    fractional = torch.bmm(pos.unsqueeze(1), torch.from_numpy(inverse).to(device)[batch]).squeeze(1)
    index = batch.unsqueeze(1).expand(-1, 3)
    low = fractional.new_full((systems, 3), torch.inf).scatter_reduce(0, index, fractional, "amin")
    high = fractional.new_full((systems, 3), -torch.inf).scatter_reduce(0, index, fractional, "amax")
    extent = (high - low).cpu().numpy()
    extent[~np.isfinite(extent)] = 0.0  # a system without atoms
    directions = _crossed(extent, inverse, pbc.cpu().numpy(), cutoff)

    # Open directions: a box of the atoms' extent and a margin, so that no fractional coordinate leaves [0, 1).
    height = 1.0 / np.linalg.norm(inverse, axis=-2)
    length = np.where(directions, 1.0, extent + cutoff / height)
    box = cell * length[:, :, None]
    mirror = np.where(np.linalg.det(box) < 0, -1.0, 1.0)
    box[:, :, 0] *= mirror[:, None]
    box = torch.from_numpy(box).to(device)
    periodic = torch.from_numpy(directions).to(device)
    wrap = torch.where(periodic[batch], fractional.floor(), torch.zeros_like(fractional))
    inside = torch.where(periodic[batch], fractional - wrap, fractional - low[batch])
    rounded_up = periodic[batch] & (inside >= 1.0)  # a coordinate of -1e-17 wraps to 1.0
    wrap, inside = wrap + rounded_up, torch.where(rounded_up, torch.zeros_like(inside), inside)
    inside = inside / torch.from_numpy(length).to(device)[batch]
    placed = torch.bmm(inside.unsqueeze(1), box[batch]).squeeze(1)

    source, target, offset = run(placed, box, periodic, batch, natoms, cutoff)
    if not directions.any():
        return source, target, None
    wrap = wrap.to(torch.int64)
    return source, target, offset + wrap[target] - wrap[source]


def _fairchem_v2(pos: Tensor, cell: np.ndarray, pbc: Tensor, counts: list[int], cutoff: float) -> Candidates:
    return _fairchem(pos, cell, pbc, counts, cutoff, _run_v2)


def _fairchem_v3(pos: Tensor, cell: np.ndarray, pbc: Tensor, counts: list[int], cutoff: float) -> Candidates:
    from fairchem.core.graph.radius_graph_pbc_nvidia import nvalchemiops_installed

    run = _run_v3 if nvalchemiops_installed() else _run_v2
    return _fairchem(pos, cell, pbc, counts, cutoff, run)


def _run_v2(pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor, natoms: Tensor, cutoff: float) -> Candidates:
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


def _run_v3(pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor, natoms: Tensor, cutoff: float) -> Candidates:
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
BUILDERS: dict[str, Callable[[Tensor, np.ndarray, Tensor, list[int], float], Candidates]] = {
    "vesin": _vesin,
    "fairchem_v2": _fairchem_v2,
    "fairchem_v3": _fairchem_v3,
}
