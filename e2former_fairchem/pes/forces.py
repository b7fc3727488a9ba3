r"""Forces against finite differences of the energy, and what rigid motion asks of them: no net force, no net torque.

With E_n the energy after a displacement of one coordinate by n h, F = -(8 (E_1 - E_-1) - (E_2 - E_-2)) / 12 h. The
formula's own error is h^4 / 30 E^(5), rounding that changes energies by d gives up to 1.5 d / h: the step is 1e-3 Å in
double precision and 1e-2 Å in single precision, where only gross errors show. What rounding does is measured
(`rounding`): a difference that it explains is unresolved. A model with direct forces has no reason to pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms

from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Metric, Outcome

STEPS = {"float64": 1e-3, "float32": 1e-2}
_MULTIPLES = (1, -1, 2, -2)


@dataclass(frozen=True)
class ForcesSettings:
    """Settings.

    Attributes:
        systems: see `systems.load_systems`.
        components: number of force components that are checked, drawn at random; all where there are fewer.
        displacement: standard deviation of the displacement from the given structure, Å, so that forces are not small.
        step: h, Å; None: by precision.
        max_error: largest difference of a component, eV/Å.
        max_net_force: largest component of the sum of forces, eV/Å: zero by translation.
        max_net_torque: largest component of the sum of r x F, eV: zero by rotation. For molecules only.
    """

    systems: list[str] = field(default_factory=lambda: ["CH3CH2OH", "water_dimer", "ammonia_crystal"])
    components: int = 24
    displacement: float = 0.05
    step: float | None = None
    max_error: float | None = 1e-4
    max_net_force: float | None = 1e-4
    max_net_torque: float | None = 1e-4


def check(potential: Potential, name: str, atoms: Atoms, settings: ForcesSettings, rng: np.random.Generator) -> Outcome:
    """One system. Curves: `force` and `difference`, components in eV/Å."""
    atoms = atoms.copy()
    atoms.positions += rng.normal(scale=settings.displacement, size=(len(atoms), 3))
    step = settings.step or STEPS[potential.precision]
    size = min(settings.components, 3 * len(atoms))
    chosen = np.sort(rng.choice(3 * len(atoms), size=size, replace=False))
    structures = [atoms]
    for component in chosen:
        for multiple in _MULTIPLES:
            moved = atoms.copy()
            moved.positions[component // 3, component % 3] += multiple * step
            structures.append(moved)
    energies, forces = potential.evaluate(structures)
    one, minus_one, two, minus_two = energies[1:].reshape(size, len(_MULTIPLES)).T
    numeric = -(8 * (one - minus_one) - (two - minus_two)) / (12 * step)
    model = forces[0].reshape(-1)[chosen]
    rounding = 18 / 12 * potential.resolution(atoms) / step  # 18: sum of the formula's coefficients
    metrics = [
        Metric("force - finite difference, max", np.abs(model - numeric).max(), "eV/Å", settings.max_error, rounding),
        Metric("net force", np.abs(forces[0].sum(axis=0)).max(), "eV/Å", settings.max_net_force),
    ]
    if not atoms.pbc.any():
        torque = np.cross(atoms.positions - atoms.positions.mean(axis=0), forces[0]).sum(axis=0)
        metrics.append(Metric("net torque", np.abs(torque).max(), "eV", settings.max_net_torque))
    notes = []
    if potential.direct_forces:
        notes.append("direct forces: they are no gradient of the energy, and dynamics does not conserve it")
    curves = {"force": model.tolist(), "difference": (model - numeric).tolist()}
    return Outcome(metrics, curves, notes)
