"""Relaxations in lockstep: many optimisers, one batch of predictions for each step of all of them.

Each structure has its own ASE optimiser with fairchem's settings for the leaderboard, so a structure's path is the one
that fairchem's recipe takes, up to the rounding of batches. A structure that is done makes room for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize.optimize import Optimizer

from e2former_fairchem.leaderboard.predictor import Prediction
from e2former_fairchem.leaderboard.recipes import MSONAtoms


def point(atoms: Atoms, energy: float, forces: np.ndarray) -> dict[str, Any]:
    """A calculation as the leaderboard takes it: `atoms` (MSONAtoms), `energy` (eV), `forces` (eV/Å)."""
    return {"atoms": MSONAtoms(atoms).as_dict(), "energy": float(energy), "forces": forces.tolist()}


class Relaxation:
    """One structure on its way down.

    Args:
        index: the structure's index.
        atoms: start; stays as it is.
        options: `optimizer`, `optimizer_kwargs`, `fmax` (eV/Å) and `max_steps`, as in fairchem's EVAL_OPT_PARAMETERS.

    Attributes:
        initial, final: calculations, see `point`; None before they are there.
        error: why it ended before its time; None where it converged or took all its steps.
        converged: whether all forces are below fmax.
    """

    def __init__(self, index: int, atoms: Atoms, options: Mapping[str, Any]) -> None:
        self.index = index
        self.atoms = atoms.copy()
        self.initial: dict[str, Any] | None = None
        self.final: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.converged = False
        self.steps = 0
        self._fmax, self._max_steps = options["fmax"], options["max_steps"]
        self._optimizer: Optimizer | None = None
        self._options = options
        self._valid: tuple[Atoms, float, np.ndarray] | None = None

    def advance(self, prediction: Prediction) -> bool:
        """Take the prediction for the present positions, and the next step; returns whether it is over.

        Whatever goes wrong ends this relaxation alone: its last valid step counts, and the reason is kept.
        """
        if isinstance(prediction, Exception):
            return self._end(prediction)
        try:
            return self._advance(*prediction)
        except Exception as err:
            return self._end(err)

    def _advance(self, energy: float, forces: np.ndarray) -> bool:
        self._valid = (self.atoms.copy(), energy, forces)
        if self.initial is None:
            self.initial = point(*self._valid)
        self.converged = bool(np.linalg.norm(forces, axis=1).max() < self._fmax)
        if self.converged or self.steps >= self._max_steps:
            return self._end(None)
        self.atoms.calc = SinglePointCalculator(self.atoms, energy=energy, forces=forces)
        if self._optimizer is None:
            make, options = self._options["optimizer"], self._options["optimizer_kwargs"]
            self._optimizer = make(self.atoms, **{"logfile": None, **options})
        self._optimizer.step()
        self.steps += 1
        return False

    def _end(self, error: Exception | None) -> bool:
        self.error = error
        if self.initial is not None:
            self.final = point(*self._valid)
        return True


def relax_all(
    structures: Iterable[tuple[int, Atoms]],
    predict: Callable[[Sequence[Atoms]], list[Prediction]],
    options: Mapping[str, Any],
    max_atoms: int,
) -> Iterator[Relaxation]:
    """Relax structures, at most `max_atoms` atoms at a time (a larger one alone); yields each when it is over."""
    waiting = deque(structures)
    active: list[Relaxation] = []
    while waiting or active:
        used = sum(len(r.atoms) for r in active)
        while waiting and (not active or used + len(waiting[0][1]) <= max_atoms):
            index, atoms = waiting.popleft()
            active.append(Relaxation(index, atoms, options))
            used += len(atoms)
        predictions = predict([r.atoms for r in active])
        over = [r.advance(prediction) for r, prediction in zip(active, predictions, strict=True)]
        yield from (r for r, ended in zip(active, over, strict=True) if ended)
        active = [r for r, ended in zip(active, over, strict=True) if not ended]
