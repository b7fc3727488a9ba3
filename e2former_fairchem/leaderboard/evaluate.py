"""The seven evaluation tasks: single points and relaxations, structure by structure into the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.optimize.optimize import Optimizer

from e2former_fairchem.files import sha256_of
from e2former_fairchem.leaderboard import journal
from e2former_fairchem.leaderboard.predictor import Prediction, PredictionError, Predictor, pack, reason
from e2former_fairchem.leaderboard.recipes import EVAL_OPT_PARAMETERS, relax_job, single_point_job
from e2former_fairchem.leaderboard.relax import Relaxation, point, relax_all
from e2former_fairchem.leaderboard.runner import JournalledRunner
from e2former_fairchem.leaderboard.tasks import get_task, load_inputs


def noticing(optimizer: type[Optimizer], caught: list[Exception]) -> type[Optimizer]:
    """The optimiser, but exceptions that fairchem's recipe only logs are put on a list on their way."""

    class Noticing(optimizer):
        def run(self, *args: Any, **kwargs: Any) -> bool:
            try:
                return super().run(*args, **kwargs)
            except Exception as err:
                caught.append(err)
                raise

    return Noticing


def require_finite(*points: dict[str, Any]) -> None:
    """Check the numbers of calculations.

    Raises:
        PredictionError: one is not finite.
    """
    for calculation in points:
        if not (np.isfinite(calculation["energy"]) and np.isfinite(calculation["forces"]).all()):
            raise PredictionError(f"expected finite numbers, got others with the energy {calculation['energy']}")


class EvaluationRunner(JournalledRunner):
    """Computes the structures of one evaluation task.

    Args:
        task: one of `tasks.TASKS`.
        data: the task's input pickle.
        batched: many structures at once, relaxations in lockstep; false: fairchem's recipe for one after another.
        options: see `JournalledRunner`; the reducer is an `evaluate_merge.EvaluationReducer`.

    Raises:
        ValueError, FileNotFoundError: see `JournalledRunner`, `tasks.load_inputs` and `EvaluationReducer`.
    """

    result_glob_pattern: ClassVar[str] = f"*{journal.SUFFIX}"

    def __init__(self, task: str, data: str | None, batched: bool = True, **options: Any) -> None:
        get_task(task)
        super().__init__(task=task, **options)
        self.units = load_inputs(task, data)
        if self.reducer is not None:
            self.reducer.check_labels({unit.path for unit in self.units})
        self.data = Path(data)
        self.batched = batched

    def sizes(self) -> Sequence[int]:
        """Number of atoms of each structure."""
        return [len(unit.atoms) for unit in self.units]

    def identity(self) -> dict[str, Any]:
        """The input file and how it is relaxed."""
        relaxation = {k: v if isinstance(v, int | float | dict) else v.__name__ for k, v in EVAL_OPT_PARAMETERS.items()}
        return {"data_sha256": sha256_of(self.data), "batched": self.batched, "relaxation": relaxation}

    def compute(self, todo: Sequence[int], predictor: Predictor) -> None:
        """Single points first, then relaxations, of which the largest come first."""
        points = [i for i in todo if not self.units[i].relax]
        relaxations = sorted((i for i in todo if self.units[i].relax), key=lambda i: (-len(self.units[i].atoms), i))
        if not self.batched:
            for index in (*points, *relaxations):
                self._record(index, partial(self._by_recipe, index, predictor))
            return
        for batch in pack([len(self.units[i].atoms) for i in points], self.max_atoms):
            indices = [points[k] for k in batch]
            structures = [self.units[i].atoms.copy() for i in indices]
            for index, atoms, found in zip(indices, structures, predictor.predict_atoms(structures), strict=True):
                self._record(index, partial(self._single_point, index, atoms, found))
        starts = ((i, self.units[i].atoms) for i in relaxations)
        for done in relax_all(starts, predictor.predict_atoms, EVAL_OPT_PARAMETERS, self.max_atoms):
            self._record(done.index, partial(self._relaxed, done))

    def _record(self, index: int, make: Callable[[], bytes]) -> None:
        """Keep what `make` returns; what it raises is this structure's failure alone, and the run goes on."""
        try:
            payload = make()
        except Exception as err:
            self.failure(index, self.units[index].name, reason(err))
        else:
            self.result([index], payload)

    def _single_point(self, index: int, atoms: Atoms, found: Prediction) -> bytes:
        if isinstance(found, Exception):
            raise found
        return self._pack(index, point(atoms, *found))

    def _relaxed(self, done: Relaxation) -> bytes:
        if done.initial is None:
            raise done.error
        ends = {"initial": done.initial, "final": done.final}
        return self._pack(done.index, ends, done.error, steps=done.steps, converged=done.converged)

    def _by_recipe(self, index: int, predictor: Predictor) -> bytes:
        unit = self.units[index]
        atoms = unit.atoms.copy()
        if not unit.relax:
            result = single_point_job(atoms, predictor.calculator)
            require_finite(result)
            return self._pack(index, result)
        caught: list[Exception] = []
        predictor.calculator.reset()
        options = {
            **EVAL_OPT_PARAMETERS,
            "optimizer": noticing(EVAL_OPT_PARAMETERS["optimizer"], caught),
            "optimizer_kwargs": {"logfile": None, **EVAL_OPT_PARAMETERS["optimizer_kwargs"]},
        }
        try:
            result = relax_job(atoms, predictor.calculator, options)
            require_finite(result["initial"], result["final"])
        except Exception:
            if caught:  # tells more than what came of it
                raise caught[0] from None
            raise
        largest = np.linalg.norm(result["final"]["forces"], axis=1).max()
        error = caught[0] if caught else None
        return self._pack(index, result, error, converged=bool(largest < EVAL_OPT_PARAMETERS["fmax"]))

    def _pack(self, index: int, result: dict[str, Any], error: Exception | None = None, **facts: Any) -> bytes:
        content = {"path": self.units[index].path, "result": result, **facts}
        if error is not None:
            content["error"] = reason(error)
        return json.dumps(content, allow_nan=False).encode()
