r"""An atom moved in fine steps so that pairs of atoms cross the cutoff: jumps of the energy and of the forces.

In a molecule the outermost atom is pulled away from the innermost one until its distances to all other atoms have
crossed the cutoff. In a periodic cell an atom is displaced, and with it its distances to all images of the others:
there a model that keeps a fixed number of neighbours shows its jumps as well. `curves.find_jumps` says what counts.

A surface may be continuous and still fall off a cliff: in an attention that normalises its weights, the last neighbour
keeps all of the weight until just before it leaves. So the force on the atom that is pulled out, over the last half
ångström before its last crossing, has a limit of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from e2former_fairchem.pes.curves import JUMP_ROUNDING, ORDER, Jump, find_jumps, in_ev, jump_estimate
from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Metric, Outcome

# A direction that is along no axis, face or diagonal.
_DIRECTION = np.array([1.0, np.sqrt(2.0), np.sqrt(3.0)]) / np.sqrt(6.0)


#: Stretch before the last crossing whose force is looked at, Å.
TAIL = 0.5


@dataclass(frozen=True)
class CutoffSettings:
    """Settings.

    Attributes:
        systems: see `systems.load_systems`.
        radius: cutoff in Å; None: the backbone's.
        step: spacing of the first grid, Å.
        margin: how far the path goes before the first and after the last crossing in a molecule, Å.
        displacement: length of the path in a periodic cell, Å.
        zooms: refinements of the grid where it looks worst, sixfold each.
        max_energy_jump: meV.
        max_force_jump: largest jump of any component of any force, eV/Å.
        max_tail_force: largest force along the path in the last 0.5 Å before the last crossing, eV/Å; molecules only.
    """

    systems: list[str] = field(default_factory=lambda: ["CH3OH", "ammonia_crystal"])
    radius: float | None = None
    step: float = 0.01
    margin: float = 0.2
    displacement: float = 0.6
    zooms: int = 2
    max_energy_jump: float | None = 0.01
    max_force_jump: float | None = 1e-3
    max_tail_force: float | None = 0.1

    def __post_init__(self) -> None:
        if self.step == 0:
            raise ValueError("cutoff.step: expected a positive number, got 0")
        if self.displacement <= 2 * ORDER * self.step:
            raise ValueError(
                f"cutoff.displacement: expected more than {2 * ORDER} steps of {self.step} Å, got {self.displacement}"
            )


@dataclass(frozen=True)
class Path:
    """Atom `index` at `origin + s * direction`, s from `start` to `end`, Å."""

    atoms: Atoms
    index: int
    origin: np.ndarray
    direction: np.ndarray
    start: float
    end: float

    def at(self, place: float) -> Atoms:
        """The structure at one place of the path."""
        moved = self.atoms.copy()
        moved.positions[self.index] = self.origin + place * self.direction
        return moved


def path_through(atoms: Atoms, radius: float, settings: CutoffSettings) -> Path:
    """The path of the atom that is moved; s is the distance to the innermost atom, or the displacement in a cell."""
    if atoms.pbc.any():
        return Path(atoms, 0, atoms.positions[0].copy(), _DIRECTION, 0.0, settings.displacement)
    centred = atoms.positions - atoms.positions.mean(axis=0)
    anchor = int(np.linalg.norm(centred, axis=1).argmin())
    bonds = atoms.positions - atoms.positions[anchor]
    index = int(np.linalg.norm(bonds, axis=1).argmax())
    direction = bonds[index] / np.linalg.norm(bonds[index])
    others = np.delete(bonds, index, axis=0)
    # |s d - o| = radius; atoms farther than the cutoff from the whole line are never crossed
    along = others @ direction
    square = radius**2 - (others**2).sum(axis=1) + along**2
    crossings = along[square > 0] + np.sqrt(square[square > 0])
    return Path(
        atoms,
        index,
        atoms.positions[anchor].copy(),
        direction,
        float(crossings.min()) - settings.margin,
        float(crossings.max()) + settings.margin,
    )


def crossings_on(path: Path, grid: np.ndarray, radius: float) -> list[float]:
    """Places between grid points where a pair, images counted each, comes within the radius or leaves it."""
    places: list[float] = []
    before: set[tuple[int, ...]] | None = None
    for k, place in enumerate(grid):
        i, j, image = neighbor_list("ijS", path.at(place), radius)
        now = set(zip(i.tolist(), j.tolist(), *image.T.tolist(), strict=True))
        if before is not None:  # every pair is there twice, once from either side
            places += [0.5 * float(grid[k - 1] + place)] * (len(now ^ before) // 2)
        before = now
    return places


def check(potential: Potential, name: str, atoms: Atoms, settings: CutoffSettings, rng: np.random.Generator) -> Outcome:
    """One system.

    Curves: `place` (s - cutoff in a molecule, else s), `energy` (relative, meV), `force` (on the moved atom, along the
    path, eV/Å), `energy_jump` (meV) and `force_jump` (eV/Å) as estimated on the first grid at `jump_place`,
    the latter on finer grids (`refined_place`, `refined_jump`), and `crossings`.

    Raises:
        ValueError: the backbone has no cutoff and no radius is set.
    """
    radius = settings.radius or potential.cutoff
    if radius is None:
        raise ValueError("cutoff.radius: expected a number for a backbone without an attribute `cutoff`, got null")
    path = path_through(atoms, radius, settings)
    points = max(2 * ORDER, round((path.end - path.start) / settings.step)) + 1
    grid = np.linspace(path.start, path.end, points)
    known: dict[float, tuple[float, np.ndarray]] = {}

    def evaluate(places: np.ndarray) -> None:
        new = [s for s in places.tolist() if s not in known]
        for s, energy, force in zip(new, *potential.evaluate([path.at(s) for s in new]), strict=True):
            known[s] = (energy, force)

    def energies_at(places: np.ndarray) -> np.ndarray:
        evaluate(places)
        return np.array([known[s][0] for s in places.tolist()])

    def forces_at(places: np.ndarray) -> np.ndarray:
        evaluate(places)
        return np.array([known[s][1] for s in places.tolist()])

    energies, forces = energies_at(grid), forces_at(grid)
    energy_jumps = find_jumps(energies_at, grid, energies, in_ev(settings.max_energy_jump), settings.zooms)
    force_jumps = find_jumps(forces_at, grid, forces, settings.max_force_jump, settings.zooms)
    shift = 0.0 if atoms.pbc.any() else radius
    crossings = crossings_on(path, grid, radius)
    rounding = 1000 * JUMP_ROUNDING * potential.resolution(path.at(path.start))
    metrics = [
        Metric("energy jump, at most", 1000 * energy_jumps[0].size, "meV", settings.max_energy_jump, rounding),
        Metric("force jump, at most", force_jumps[0].size, "eV/Å", settings.max_force_jump),
        Metric("pairs that crossed the cutoff", len(crossings), ""),
    ]
    along = forces[:, path.index] @ path.direction
    if not atoms.pbc.any():
        tail = np.abs(along[grid > path.end - settings.margin - TAIL])
        metrics.append(Metric(f"force in the last {TAIL} Å, max", tail.max(), "eV/Å", settings.max_tail_force))
    middle = slice(ORDER // 2, -(ORDER // 2))
    curves = {
        "place": (grid - shift).tolist(),
        "energy": (1000 * (energies - energies[-1])).tolist(),
        "force": along.tolist(),
        "jump_place": (grid[middle] - shift).tolist(),
        "energy_jump": (1000 * jump_estimate(energies)).tolist(),
        "force_jump": jump_estimate(forces).tolist(),
        "refined_place": [jump.place - shift for jump in force_jumps if jump.step < float(grid[1] - grid[0])],
        "refined_jump": [jump.size for jump in force_jumps if jump.step < float(grid[1] - grid[0])],
        "crossings": (np.array(crossings) - shift).tolist(),
        "molecule": not bool(atoms.pbc.any()),
    }
    notes = [_where("energy", energy_jumps[0], shift, settings.max_energy_jump, 1000)]
    notes.append(_where("force", force_jumps[0], shift, settings.max_force_jump, 1))
    return Outcome(metrics, curves, [note for note in notes if note])


def _where(what: str, jump: Jump, shift: float, limit: float | None, factor: float) -> str:
    """Where a jump above the limit is."""
    if limit is None or factor * jump.size <= limit:
        return ""
    origin = f"{jump.place - shift:+.6f} Å from the cutoff" if shift else f"{jump.place:.6f} Å along the path"
    return f"{what} jumps at {origin} (seen on a grid of {jump.step:.0e} Å)"
