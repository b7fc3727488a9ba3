"""ASE's integrators."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet

from e2former_fairchem.md.engine import check_move, with_results
from e2former_fairchem.md.settings import BAR, Settings

#: What ASE's barostat keeps from step to step, under names of its own (ASE 3.26 to 3.29).
_NPT_STATE = (
    "_q",
    "_p",
    "_eps",
    "_p_eps",
    "_cell0",
    "_volume0",
    "_thermostat._eta",
    "_thermostat._p_eta",
    "_barostat._xi",
    "_barostat._p_xi",
)


def _nve(atoms: Atoms, settings: Settings, rng: np.random.Generator) -> MolecularDynamics:
    return VelocityVerlet(atoms, settings.timestep * units.fs)


def _nvt(atoms: Atoms, settings: Settings, rng: np.random.Generator) -> MolecularDynamics:
    friction = 1 / (settings.thermostat_time * units.fs)
    return Langevin(
        atoms, settings.timestep * units.fs, temperature_K=settings.temperature, friction=friction, fixcm=False, rng=rng
    )


def _npt(atoms: Atoms, settings: Settings, rng: np.random.Generator) -> MolecularDynamics:
    return IsotropicMTKNPT(
        atoms,
        settings.timestep * units.fs,
        temperature_K=settings.temperature,
        pressure_au=settings.pressure * BAR,
        tdamp=settings.thermostat_time * units.fs,
        pdamp=settings.barostat_time * units.fs,
    )


_INTEGRATORS: dict[str, Callable[[Atoms, Settings, np.random.Generator], MolecularDynamics]] = {
    "nve": _nve,
    "nvt": _nvt,
    "npt": _npt,
}


class ASEEngine:
    """ASE's integrators and a calculator; see `engine.Engine`.

    `nvt` takes the motion of the centre of mass, which the noise brings, away after each step.

    Args:
        atoms: with momenta.
        calculator: of energy and forces, and of stress for `npt`.
        settings: what is simulated.
    """

    name = "ase"

    def __init__(self, atoms: Atoms, calculator: Calculator, settings: Settings) -> None:
        self.settings = settings
        self.steps = 0
        self._atoms = atoms.copy()
        self._atoms.calc = calculator
        self._symbols = atoms.get_chemical_symbols()
        self._stress = "stress" in calculator.implemented_properties and bool(atoms.pbc.all())
        self._rng = np.random.default_rng([settings.seed, 1])
        self._dynamics = _INTEGRATORS[settings.ensemble](self._atoms, settings, self._rng)

    def advance(self, steps: int) -> None:
        """Do some steps; see `engine.Engine`."""
        atoms = self._atoms
        for _ in range(steps):
            before, forces, step = atoms.get_positions(), None, self.steps + 1
            time = step * self.settings.timestep / 1000
            try:
                self._dynamics.step()
                forces = atoms.get_forces()
            except Exception as err:
                check_move(step, time, self._symbols, before, atoms.get_positions(), None)
                err.add_note(f"in step {step} ({time:g} ps)")
                raise
            check_move(step, time, self._symbols, before, atoms.get_positions(), forces)
            if self.settings.ensemble == "nvt":
                Stationary(atoms, preserve_temperature=False)
            self.steps = step

    def frame(self) -> Atoms:
        """The atoms now; see `engine.Engine`."""
        atoms = self._atoms
        stress = atoms.get_stress() if self._stress else None
        return with_results(atoms, atoms.get_potential_energy(), atoms.get_forces(), stress)

    def state(self) -> dict[str, np.ndarray]:
        """See `engine.Engine`. The last results are kept as they are: a GPU need not repeat them to the last bit."""
        atoms = self._atoms
        atoms.get_forces()
        results = {key: atoms.calc.results[key] for key in ("energy", "forces", "stress") if key in atoms.calc.results}
        found: dict[str, Any] = {
            "positions": atoms.get_positions(),
            "momenta": atoms.get_momenta(),
            "cell": np.array(atoms.cell),
            "noise": json.dumps(self._rng.bit_generator.state),
            **{f"result.{key}": value for key, value in results.items()},
        }
        if self.settings.ensemble == "npt":
            found |= {f"npt.{name}": attrgetter(name)(self._dynamics) for name in _NPT_STATE}
        return {key: np.array(value) for key, value in found.items()}

    def restore(self, steps: int, state: dict[str, np.ndarray]) -> None:
        """Go on where `state` was taken; see `engine.Engine`."""
        self.steps = steps
        atoms, calculator = self._atoms, self._atoms.calc
        atoms.set_cell(state["cell"])
        atoms.set_positions(state["positions"])
        atoms.set_momenta(state["momenta"])
        self._rng.bit_generator.state = json.loads(str(state["noise"]))
        for name in _NPT_STATE if self.settings.ensemble == "npt" else ():
            owner, _, last = name.rpartition(".")
            value = state[f"npt.{name}"]
            setattr(
                attrgetter(owner)(self._dynamics) if owner else self._dynamics,
                last,
                value if value.ndim else float(value),
            )
        results = {key.removeprefix("result."): value for key, value in state.items() if key.startswith("result.")}
        results["energy"] = float(results["energy"])
        calculator.results = results | {"free_energy": results["energy"]}
        calculator.atoms = atoms.copy()
