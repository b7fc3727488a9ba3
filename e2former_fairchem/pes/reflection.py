r"""Mirror images have the same energy, E(M x) = E(x) and F(M x) = M F(x); rotated copies too, as the control.

Reflections are a symmetry of nature at this level, but not of every network: one that lets features of either parity
mix (SO(3)- but not O(3)-equivariant, as E2Former-V2 unless `reflection_equivariant` is set) does not know it. Only
chiral structures tell the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms
from scipy.spatial.transform import Rotation

from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Metric, Outcome


@dataclass(frozen=True)
class ReflectionSettings:
    """Settings.

    Attributes:
        systems: chiral ones; see `systems.load_systems`.
        rotations: number of random rotations.
        max_energy: largest difference between mirror images, meV.
        max_force: largest difference of a component of their forces, eV/Å.
        max_rotation: largest difference between rotated copies, meV.
    """

    systems: list[str] = field(default_factory=lambda: ["H2O2", "methyloxirane"])
    rotations: int = 6
    max_energy: float | None = 1.0
    max_force: float | None = 0.01
    max_rotation: float | None = 0.01


def transformed(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    """Positions and cell under a 3 x 3 matrix."""
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ matrix.T)
    moved.positions = atoms.positions @ matrix.T
    return moved


def check(
    potential: Potential, name: str, atoms: Atoms, settings: ReflectionSettings, rng: np.random.Generator
) -> Outcome:
    """One system. Curves: `mirror` and `rotations`, energy differences in meV."""
    mirror = np.diag([-1.0, 1.0, 1.0])
    rotations = Rotation.random(settings.rotations, rng=rng).as_matrix()
    structures = [atoms, transformed(atoms, mirror), *(transformed(atoms, matrix) for matrix in rotations)]
    energies, forces = potential.evaluate(structures)
    apart = 1000 * np.abs(energies[1:] - energies[0])
    force = np.abs(forces[1] - forces[0] @ mirror.T).max()
    rounding = 2 * 1000 * potential.resolution(atoms)  # of two energies
    metrics = [
        Metric("energy of the mirror image", apart[0], "meV", settings.max_energy, rounding),
        Metric("forces of the mirror image, max", force, "eV/Å", settings.max_force),
        Metric("energy of rotated copies, max", apart[1:].max(), "meV", settings.max_rotation, rounding),
    ]
    notes = []
    if potential.mirror_images_differ and metrics[0].verdict == "fail":
        notes.append("expected: the checkpoint's network was built with reflection_equivariant: false")
    return Outcome(metrics, {"mirror": float(apart[0]), "rotations": apart[1:].tolist()}, notes)
