"""What fairchem's parallel predict unit does not check, checked: fixed inputs, and one model for a group of workers.

fairchem's `ParallelMLIPPredictUnit` runs worker 0 in the caller's process, whose graph-parallel group is a global: any
other model of that process would wait for workers that do not know of it. And with ``merge_mole``, which its presets
for molecular dynamics set, it sends only positions and cell after the first call: another charge, spin, element or
number of atoms would be computed as the first one, or wait forever. Both are errors here, raised before data is sent.

None of this concerns workers that are started otherwise (training, torchrun): every one of them has its own batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.common import gp_utils

from e2former_fairchem.parallel import active

if TYPE_CHECKING:
    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

__all__ = ["ParallelGuard"]

_REMEDY = (
    'use inference_settings="batch" (or merge_mole=False), which sends whole structures to the workers, or make a new '
    "calculator in a new process"
)


@dataclass
class _Session:
    """The predict unit of the present group of workers in this process.

    Args:
        group: fairchem's.
        model: the backbone of the unit.
        fixed: what may not change between its calls, None when everything is sent.
        validated: a calculator has just announced the structure of the next call.
        failed: an error ended the loop in which the other workers wait.
    """

    group: Any = None
    model: Any = None
    fixed: dict[str, Any] | None = None
    validated: bool = False
    failed: str | None = None


_session = _Session()


def _present() -> bool:
    """Whether this process is a worker of fairchem's parallel predict unit."""
    ray = sys.modules.get("ray")
    return active() and ray is not None and ray.is_initialized()


def _current() -> bool:
    return _session.group is not None and _session.group is gp_utils.get_gp_group()


class ParallelGuard:
    """Checks of one backbone, called from the hooks of fairchem's backbone interface."""

    def __init__(self) -> None:
        self.serial = False  # prepared outside of any group

    def prepare(self, model: Any, data: AtomicData, settings: InferenceSettings) -> None:
        """At a unit's first prediction. Raise RuntimeError for another unit among the workers of one group."""
        self.serial = not active()
        if not _present():
            return
        if _current() and _session.model is not model:
            _raise_second()
        _session.group, _session.model, _session.failed = gp_utils.get_gp_group(), model, None
        _session.fixed = _of_data(data) if settings.merge_mole else None

    def refusal(self, model: Any) -> str | None:
        """Before every prediction: why this worker cannot make it, to be told to all workers. Marks it as announced.

        Args:
            model: the backbone that is asked.

        Raises:
            RuntimeError: it is outside the group, and no other worker would answer.
        """
        validated, _session.validated = _session.validated, False
        if not _present():
            if active() and self.serial:
                _raise_second()
            return None
        if not _current() or _session.model is not model:
            _raise_second()
        if _session.failed is not None:
            raise RuntimeError(_session.failed)
        if _session.fixed is not None and gp_utils.get_gp_rank() == 0 and not validated:
            return (
                "e2former_v2: fairchem's parallel predict unit with merge_mole sends only positions and cell after the "
                "first call, so that a changed charge, spin or composition would go unnoticed: expected predictions "
                f"through FAIRChemCalculator, which announces structures, got a direct call of predict; {_REMEDY}"
            )
        return None

    def announce(self, atoms: Atoms, task_name: str) -> None:
        """Called by a calculator before it predicts, in the process of worker 0.

        Args:
            atoms: the structure.
            task_name: data set of the task.

        Raises:
            ValueError: the structure differs from the first one in more than positions and cell.
            RuntimeError: an error has ended the other workers.
        """
        _session.validated = False  # an announcement that fails here must not open the way for a direct call
        if not _present() or not _current():
            _session.validated = True
            return
        if self.serial:
            _raise_second()
        if _session.failed is not None:
            raise RuntimeError(_session.failed)
        given = {} if _session.fixed is None else _of_atoms(atoms, task_name)
        for name, first in (_session.fixed or {}).items():
            if not np.array_equal(given[name], first):
                raise ValueError(
                    f"e2former_v2: expected the {name} of the first call of this parallel calculator, "
                    f"{_short(first)}, got {_short(given[name])}: with merge_mole, fairchem's parallel predict unit "
                    f"sends only positions and cell after the first call; {_REMEDY}"
                )
        _session.validated = True

    def remember(self, error: Exception) -> None:
        """Remember an error after which the workers no longer listen (all of them raise it)."""
        if _session.fixed is not None and _current():
            _session.failed = f"e2former_v2: the graph-parallel workers stopped after an error ({error}); {_REMEDY}"


def _raise_second() -> None:
    _session.validated = False
    raise RuntimeError(
        "e2former_v2: a parallel calculator (workers > 1) lives in this process, and its workers would not answer "
        "another model; expected one model for a group of workers, got a second. Run the other one in a process of "
        "its own, or end the group first with fairchem.core.common.distutils.cleanup_gp_ray()"
    )


def _of_data(data: AtomicData) -> dict[str, Any]:
    return {
        "number of atoms": int(data["pos"].shape[0]),
        "elements": data["atomic_numbers"].cpu().numpy(),
        "charge": data["charge"].cpu().numpy().reshape(-1),
        "spin": data["spin"].cpu().numpy().reshape(-1),
        "periodicity": data["pbc"].cpu().numpy().reshape(-1),
        "task": [str(name) for name in data.dataset],
    }


def _of_atoms(atoms: Atoms, task_name: str) -> dict[str, Any]:
    return {
        "number of atoms": len(atoms),
        "elements": atoms.numbers,
        "charge": np.array([atoms.info["charge"]]),
        "spin": np.array([atoms.info["spin"]]),
        "periodicity": np.asarray(atoms.pbc),
        "task": [task_name],
    }


def _short(value: Any) -> str:
    values = np.atleast_1d(value).tolist()
    return str(values[0]) if len(values) == 1 else str(values[:8])[:-1] + (", ...]" if len(values) > 8 else "]")
