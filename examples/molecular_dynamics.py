"""Molecular dynamics of a water dimer: NVE with the drift of its total energy, and NVT with a Langevin thermostat.

python examples/molecular_dynamics.py [CHECKPOINT] [--steps 400]
"""

from __future__ import annotations

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import LBFGS
from common import arguments, calculator, run

TEMPERATURE = 200.0  # K
TIME_STEP = 0.5  # fs


def water_dimer() -> Atoms:
    """A donor with one hydrogen towards the acceptor's oxygen."""
    donor, acceptor = molecule("H2O"), molecule("H2O")
    donor.rotate(127.75, "x")
    acceptor.rotate(90, "y")
    acceptor.translate(np.array([0.0, 0.0, 2.9]) - acceptor.positions[0] + donor.positions[0])
    dimer = donor + acceptor
    dimer.info.update(charge=0, spin=1)
    return dimer


def drift(times_ps: np.ndarray, energies_ev: np.ndarray, natoms: int) -> float:
    """Slope of the total energy, meV/atom/ps."""
    return float(np.polyfit(times_ps, energies_ev, 1)[0]) * 1000 / natoms


def main() -> None:
    """Print drift and fluctuation of the total energy (NVE), and the mean temperature (NVT)."""
    args = arguments(__doc__, steps=400)
    atoms = water_dimer()
    atoms.calc = calculator(args.checkpoint)
    LBFGS(atoms, logfile=None).run(fmax=0.05, steps=args.steps)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(0))
    Stationary(atoms)
    ZeroRotation(atoms)
    times, energies = [], []
    dynamics = VelocityVerlet(atoms, timestep=TIME_STEP * units.fs)

    def record() -> None:
        times.append(dynamics.get_time() / units.fs / 1000)
        energies.append(atoms.get_total_energy())

    dynamics.attach(record)
    dynamics.run(args.steps)
    slope = drift(np.array(times), np.array(energies), len(atoms))
    spread = 1000 * np.std(energies) / len(atoms)
    print(f"NVE {times[-1]:.3f} ps: drift {slope:+.4f} meV/atom/ps, fluctuation {spread:.4f} meV/atom")

    temperatures: list[float] = []
    thermostat = Langevin(
        atoms, TIME_STEP * units.fs, temperature_K=TEMPERATURE, friction=0.02 / units.fs, rng=np.random.default_rng(1)
    )
    thermostat.attach(lambda: temperatures.append(atoms.get_temperature()))
    thermostat.run(args.steps)
    print(f"NVT {TEMPERATURE:.0f} K: mean temperature {np.mean(temperatures):.0f} K over {args.steps} steps")


if __name__ == "__main__":
    run(main)
