"""What the engines have in common: a frame, starting velocities, and when a run has blown up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.velocitydistribution import Stationary

from e2former_fairchem.md.settings import GPA

#: Å in one step. Hydrogen at 1,000 K moves 0.05 Å in a femtosecond; nothing that is to be integrated moves so far.
LARGEST_MOVE = 1.0


class BlownUp(RuntimeError):
    """An atom moved too far in one step, or its force is not finite."""


class Engine(Protocol):
    """An integrator with its atoms.

    Attributes:
        name: as `engine:` of the config has it.
        steps: done so far.
    """

    name: str
    steps: int

    def advance(self, steps: int) -> None:
        """Do some steps.

        Raises:
            BlownUp: the step and the atom.
        """

    def frame(self) -> Atoms:
        """The atoms now, with momenta and a calculator that holds energy, forces and, where there is one, stress."""

    def state(self) -> dict[str, np.ndarray]:
        """All that the next step depends on, to the last bit."""

    def restore(self, steps: int, state: dict[str, np.ndarray]) -> None:
        """Go on where `state` was taken, after so many steps."""


def draw_velocities(atoms: Atoms, temperature: float, seed: int) -> None:
    """Maxwell and Boltzmann's velocities at a temperature (K), without motion of the centre of mass."""
    # ASE's function for it has one name up to 3.28 and another from 3.29 on, where the first one warns
    width = np.sqrt(units.kB * temperature * atoms.get_masses())
    atoms.set_momenta(width[:, None] * np.random.default_rng([seed, 0]).standard_normal((len(atoms), 3)))
    Stationary(atoms, preserve_temperature=False)


def with_results(atoms: Atoms, energy: float, forces: np.ndarray, stress: np.ndarray | None) -> Atoms:
    """A copy of the atoms that knows its energy (eV), forces (eV/Å) and stress (Voigt, eV/Å³)."""
    found = atoms.copy()
    results = {"energy": energy, "forces": forces} | ({} if stress is None else {"stress": stress})
    found.calc = SinglePointCalculator(found, **results)
    return found


def check_move(
    step: int, time: float, symbols: list[str], before: np.ndarray, after: np.ndarray, forces: np.ndarray | None
) -> None:
    """Look for an atom that a step threw out.

    Args:
        step: number of the step.
        time: ps.
        symbols: of the atoms.
        before: [N, 3] Å.
        after: [N, 3] Å.
        forces: [N, 3] eV/Å afterwards, or None where they could not be computed.

    Raises:
        BlownUp: step, atom, and what is wrong with it.
    """
    move = np.linalg.norm(after - before, axis=1)
    size = np.zeros(len(move)) if forces is None else np.linalg.norm(forces, axis=1)
    good = (move <= LARGEST_MOVE) & np.isfinite(size)
    if good.all():
        return
    wrong = np.flatnonzero(~good)
    worst = int(wrong[np.argmax(np.nan_to_num(move[wrong], nan=np.inf))])
    raise BlownUp(blown_up(step, time, worst, symbols[worst], float(move[worst]), float(size[worst]), len(wrong)))


def blown_up(step: int, time: float, atom: int, symbol: str, move: float, force: float, number: int) -> str:
    """The message of `BlownUp`; atom: index, move: Å in this step, force: eV/Å, number: atoms alike."""
    return (
        f"step {step} ({time:g} ps): atom {atom} ({symbol}) moved {move:.3g} Å in one step (at most {LARGEST_MOVE:g} "
        f"are sensible), force {force:.3g} eV/Å; {number} atoms alike. The time step may be too long, or "
        "the structure lie outside what the checkpoint was trained on"
    )


@dataclass(frozen=True)
class Observables:
    """Numbers of a frame. Energies in eV, temperature in K, pressure in GPa (None without stress), volume in Å³."""

    potential_energy: float
    kinetic_energy: float
    total_energy: float
    temperature: float
    pressure: float | None
    volume: float | None

    @classmethod
    def of(cls, atoms: Atoms) -> Observables:
        """Of a frame. The centre of mass stands still, so that 3 N - 3 degrees of freedom have the temperature.

        The pressure has the kinetic part, of these degrees of freedom too.
        """
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        temperature = 2 * kinetic / ((3 * len(atoms) - 3) * units.kB)
        stress = atoms.calc.results.get("stress")
        periodic = bool(atoms.pbc.all())
        volume = float(atoms.get_volume()) if periodic else None
        pressure = None
        if periodic and stress is not None:
            pressure = float(-np.sum(stress[:3]) / 3 + 2 * kinetic / (3 * volume)) / GPA
        return cls(float(potential), float(kinetic), float(potential + kinetic), float(temperature), pressure, volume)
