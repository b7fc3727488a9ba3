r"""Drift of the total energy in molecular dynamics at constant energy (velocity Verlet).

A straight line is fitted to the total energy per atom after equilibration; its slope is the drift, in meV/atom/ps. The
integrator itself makes the total energy oscillate (by a power of two in the time step) without a drift.

fairchem's `NVEMDRunner` is not used: it wants an array job for each structure, draws its velocities unseeded and keeps
the molecule's rotation and translation, steps by 5 fs, and its log holds energies to 0.1 meV/atom, which is what a
good surface loses in a nanosecond.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import LBFGS

from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Metric, Outcome


@dataclass(frozen=True)
class NVESettings:
    """Settings.

    Attributes:
        systems: see `systems.load_systems`.
        temperature: of the initial velocities, K; half of it is left after equilibration.
        time_step: fs.
        steps: of the integrator.
        equilibration: share of the steps, from the beginning, that the fit leaves out.
        relax_steps: steps of LBFGS before (to 0.05 eV/Å).
        max_drift: largest absolute drift, meV/atom/ps.
    """

    systems: list[str] = field(default_factory=lambda: ["CH3OH"])
    temperature: float = 300.0
    time_step: float = 0.5
    steps: int = 600
    equilibration: float = 0.1
    relax_steps: int = 50
    max_drift: float | None = 1.0

    def __post_init__(self) -> None:
        if self.equilibration >= 1:
            raise ValueError(f"nve.equilibration: expected a share below 1, got {self.equilibration}")
        if round((1 - self.equilibration) * self.steps) < 10:
            raise ValueError(f"nve.steps: expected at least 10 after equilibration, got {self.steps}")
        if self.time_step == 0:
            raise ValueError("nve.time_step: expected a positive number, got 0")


def check(potential: Potential, name: str, atoms: Atoms, settings: NVESettings, rng: np.random.Generator) -> Outcome:
    """One system. Curves: `time` in ps, `energy` (total, less its mean) and `fit` in meV/atom."""
    atoms = atoms.copy()
    atoms.calc = potential.calculator
    LBFGS(atoms, logfile=None).run(fmax=0.05, steps=settings.relax_steps)
    # Maxwell and Boltzmann; ASE's own function changed its name between the versions that fairchem takes.
    width = np.sqrt(units.kB * settings.temperature * atoms.get_masses())
    atoms.set_momenta(width[:, None] * rng.standard_normal((len(atoms), 3)))
    Stationary(atoms)
    if not atoms.pbc.any():
        ZeroRotation(atoms)
    energies, temperatures = [], []
    dynamics = VelocityVerlet(atoms, timestep=settings.time_step * units.fs)

    def record() -> None:
        energies.append(atoms.get_total_energy())
        temperatures.append(atoms.get_temperature())

    dynamics.attach(record)
    dynamics.run(settings.steps)
    time = np.arange(len(energies)) * settings.time_step / 1000
    energy = 1000 * np.array(energies) / len(atoms)
    kept = slice(round(settings.equilibration * settings.steps), None)
    (slope, start), covariance = np.polyfit(time[kept], energy[kept], 1, cov=True)
    spread = float(np.std(energy[kept] - (slope * time[kept] + start)))
    metrics = [
        Metric("drift of the total energy", abs(slope), "meV/atom/ps", settings.max_drift),
        Metric("standard error of the drift", float(np.sqrt(covariance[0, 0])), "meV/atom/ps"),
        Metric("fluctuation of the total energy", spread, "meV/atom"),
        Metric("mean temperature", float(np.mean(temperatures[kept])), "K"),
    ]
    mean = float(np.mean(energy[kept]))
    curves = {
        "time": time.tolist(),
        "energy": (energy - mean).tolist(),
        "fit": (slope * time + start - mean).tolist(),
        "fit_from": float(time[kept][0]),
        "drift": float(slope),
    }
    return Outcome(metrics, curves)
