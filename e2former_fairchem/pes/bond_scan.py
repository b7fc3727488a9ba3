r"""A bond stretched rigidly from a compressed to a broken one: extra minima, jumps, and forces against energies.

A bond of a small closed-shell molecule has one minimum and no barrier; every further extremum, at which the force along
the bond changes its sign, is an artefact of the surface (the idea of the bond smoothness test, arXiv:2602.04861). With
B the fragment that moves along the unit vector u, dE/dr = -sum_{a in B} F_a . u must hold along the whole scan:
E(r) - E(r_0) is compared with the integral of the forces, and jumps are looked for as in `cutoff`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from e2former_fairchem.pes.curves import JUMP_ROUNDING, ORDER, extrema, find_jumps, in_ev, integrate
from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Metric, Outcome


@dataclass(frozen=True)
class BondScanSettings:
    """Settings.

    Attributes:
        systems: see `systems.load_systems`. In larger molecules the bond with the most equal fragments is stretched.
        shortest, longest: ends of the scan, in units of the given bond length.
        points: of the first grid.
        prominence: depth of a minimum, or height of a maximum, that counts, meV.
        zooms: refinements of the grid where it looks worst, sixfold each.
        max_extra_extrema: largest number of minima and maxima beside the bond's minimum.
        max_work_error: largest difference of the energy along the scan from the integral of the forces, meV.
        max_energy_jump: meV.
        max_force_jump: largest jump of any component of any force, eV/Å.
    """

    systems: list[str] = field(default_factory=lambda: ["H2", "N2", "HF", "CO", "CH3OH"])
    shortest: float = 0.75
    longest: float = 2.5
    points: int = 241
    prominence: float = 1.0
    zooms: int = 2
    max_extra_extrema: float | None = 0.0
    max_work_error: float | None = 1.0
    max_energy_jump: float | None = 0.01
    max_force_jump: float | None = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.shortest < 1 < self.longest:
            raise ValueError(
                f"bond_scan: expected 0 < shortest < 1 < longest, got shortest {self.shortest}, longest {self.longest}"
            )
        if self.points <= 2 * ORDER or self.points % 2 == 0:
            raise ValueError(f"bond_scan.points: expected an odd number above {2 * ORDER}, got {self.points}")


def splitting_bond(atoms: Atoms) -> tuple[int, int, np.ndarray] | None:
    """The bond (i, j) whose removal leaves two fragments of the most equal size, and a mask [N] of the one that moves.

    Bonds are pairs within the sum of covalent radii (ASE's, 25 % larger). None where no bond splits the molecule, or
    where there is more than one molecule.
    """
    number = len(atoms)
    one, other = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.25), self_interaction=False)
    bonds = [(int(i), int(j)) for i, j in zip(one, other, strict=True) if i < j]

    def fragments(pairs: list[tuple[int, int]]) -> tuple[int, np.ndarray]:
        i, j = np.array(pairs, dtype=int).reshape(-1, 2).T
        return connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(number, number)), directed=False)

    if fragments(bonds)[0] != 1:
        return None
    best = None
    for bond in bonds:
        count, label = fragments([other for other in bonds if other != bond])
        if count != 2:
            continue
        moving = label == label[bond[1]]
        balance = min(moving.sum(), number - moving.sum())
        if best is None or balance > best[0]:
            best = (balance, *bond, moving)
    return None if best is None else best[1:]


def check(
    potential: Potential, name: str, atoms: Atoms, settings: BondScanSettings, rng: np.random.Generator
) -> Outcome:
    """One system. Curves: `distance` in Å, `energy` (above its minimum) in eV, `extrema` (distances), `bond`."""
    if atoms.pbc.any():
        return Outcome(skipped="periodic: no bond to break")
    found = splitting_bond(atoms)
    if found is None:
        return Outcome(skipped="no single bond splits it into two fragments")
    i, j, moving = found
    bond = atoms.positions[j] - atoms.positions[i]
    length = float(np.linalg.norm(bond))
    unit = bond / length
    grid = np.linspace(settings.shortest * length, settings.longest * length, settings.points)

    def stretched(distance: float) -> Atoms:
        moved = atoms.copy()
        moved.positions[moving] += (distance - length) * unit
        return moved

    def energies_at(places: np.ndarray) -> np.ndarray:
        return potential.evaluate([stretched(r) for r in places.tolist()])[0]

    def forces_at(places: np.ndarray) -> np.ndarray:
        return np.array(potential.evaluate([stretched(r) for r in places.tolist()])[1])

    energies, forces = potential.evaluate([stretched(r) for r in grid.tolist()])
    forces = np.array(forces)
    along = forces[:, moving].sum(axis=1) @ unit
    step = float(grid[1] - grid[0])
    work = 1000 * np.abs(energies[::2] - energies[0] + integrate(along, step)).max()
    minima, maxima = extrema(energies, settings.prominence / 1000)
    extra = max(len(minima) - 1, 0) + len(maxima)
    energy_jumps = find_jumps(energies_at, grid, energies, in_ev(settings.max_energy_jump), settings.zooms)
    force_jumps = find_jumps(forces_at, grid, forces, settings.max_force_jump, settings.zooms)
    rounding = 1000 * potential.resolution(stretched(grid[0]))
    jump = 1000 * energy_jumps[0].size
    symbols = f"{atoms.symbols[i]}-{atoms.symbols[j]}"
    metrics = [
        Metric("extra minima and maxima", extra, "", settings.max_extra_extrema),
        Metric("energy - work of the forces, max", float(work), "meV", settings.max_work_error, 2 * rounding),
        Metric("energy jump, at most", jump, "meV", settings.max_energy_jump, JUMP_ROUNDING * rounding),
        Metric("force jump, at most", force_jumps[0].size, "eV/Å", settings.max_force_jump),
    ]
    notes = []
    lowest = int(energies.argmin())
    if len(minima):
        deepest = int(minima[energies[minima].argmin()])
        metrics.append(Metric("bond length at the minimum", float(grid[deepest]), "Å"))
        others = [k for k in np.sort(np.concatenate([minima, maxima])) if k != deepest]
    else:
        others = maxima.tolist()
        notes.append(f"{symbols}: no minimum between {grid[0]:.2f} and {grid[-1]:.2f} Å")
    if others:
        notes.append(f"{symbols}: extra extrema at " + ", ".join(f"{grid[k]:.2f}" for k in others) + " Å")
    curves = {
        "bond": symbols,
        "distance": grid.tolist(),
        "energy": (energies - energies[lowest]).tolist(),
        "extrema": [float(grid[k]) for k in others],
        "extrema_energy": [float(energies[k] - energies[lowest]) for k in others],
    }
    return Outcome(metrics, curves, notes)
