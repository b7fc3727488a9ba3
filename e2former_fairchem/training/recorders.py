"""What `metrics.py`, where a metric begins, reads off a step: losses, eager or replayed, and validation forces.

Off an eager step by hooks on fairchem's losses; a replayed one calls none, and the unit hands over what it has
(`training.unit.TrainEvalUnit.replayed_step_listeners`). The gradient's norm is the unit's ``last_grad_norm`` in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task, get_output_mask
from torch import Tensor
from torchtnt.framework.unit import TEvalUnit, TTrainUnit


class LossRecorder:
    """Sums of the losses of training steps, task by task, with the number of steps, structures and atoms.

    fairchem's unit keeps the total loss only. Everything stays on the device: reading a number in every step would make
    every step wait for the GPU. Losses of evaluations are not counted.

    Args:
        unit: the unit that trains; `detach` takes the hooks off its losses. Steps that it replays call no loss: it
            hands theirs over (`training.unit.TrainEvalUnit.replayed_step_listeners`).
    """

    def __init__(self, unit: TTrainUnit) -> None:
        self._recording = False
        self._first = unit.tasks[0].name
        self._hooks = [
            task.loss_fn.register_forward_hook(partial(self._of_eager_step, task.name), with_kwargs=True)
            for task in unit.tasks
        ]
        self._listeners = getattr(unit, "replayed_step_listeners", [])
        self._listeners.append(self._of_replayed_step)
        self.tasks = [task.name for task in unit.tasks]
        self.reset()

    def reset(self) -> None:
        """Start new sums."""
        self.steps = 0
        self.structures = 0
        self.losses: dict[str, Tensor] = {}
        self.atoms: Tensor | int = 0

    def start_step(self) -> None:
        """A training step begins: its losses count."""
        self._recording = True
        self.steps += 1

    def end_step(self) -> None:
        """A training step ends: losses from here on are an evaluation's."""
        self._recording = False

    def _of_eager_step(self, task: str, _module: Any, _args: Any, kwargs: Mapping[str, Any], loss: Tensor) -> None:
        if not self._recording:
            return
        self.losses[task] = self.losses.get(task, 0.0) + loss.detach()
        if task == self._first and "natoms" in kwargs:
            self.structures += kwargs["natoms"].numel()
            self.atoms = self.atoms + kwargs["natoms"].sum()

    def _of_replayed_step(self, losses: Mapping[str, Tensor], structures: int, atoms: int) -> None:
        for task, loss in losses.items():
            self.losses[task] = self.losses.get(task, 0.0) + loss
        self.structures += structures
        self.atoms = self.atoms + atoms

    def means(self) -> dict[str, float]:
        """Mean loss of each task on this rank; waits for the device."""
        return {task: float(total) / max(self.steps, 1) for task, total in self.losses.items()}

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._of_replayed_step in self._listeners:
            self._listeners.remove(self._of_replayed_step)


def task_of(tasks: Sequence[Task], prop: str, dataset: str) -> Task | None:
    """The task that predicts a property of a set; as in fairchem, one of the task's data sets is part of its name."""
    return next((t for t in tasks if t.property == prop and any(name in dataset for name in t.datasets)), None)


def valid(batch: AtomicData, task: Task, dataset: str) -> Tensor:
    """Mask of the structures (or atoms) of a data set in a batch that fairchem's metrics of a task count."""
    mask = get_output_mask(batch, task)[f"{dataset}.{task.name}"]
    if task.level == "atom" and task.eval_on_free_atoms:
        mask = mask & (batch.fixed == 0)
    return mask


class ZeroForceRecorder:
    """Mean absolute force component of every validation set, eV/Å, from the batches that pass.

    This is the error of predicting zero. Taken from the evaluation itself, it reads no data twice and counts what
    fairchem's metrics count.

    Args:
        unit: the unit that evaluates, or trains and evaluates; `detach` takes the hook off its model.
    """

    def __init__(self, unit: TEvalUnit) -> None:
        unit = getattr(unit, "eval_unit", unit)
        self._tasks = unit.tasks
        self._sums: dict[str, list[Any]] = {}
        self._hook = unit.model.register_forward_pre_hook(self._record)

    def _record(self, _module: Any, inputs: tuple) -> None:
        batch = inputs[0]
        for name in set(batch.dataset_name):
            task = task_of(self._tasks, "forces", name)
            if task is None or task.name not in batch:
                continue
            mask = valid(batch, task, name)
            size = torch.where(mask[:, None], batch[task.name], 0).abs()
            sums = self._sums.setdefault(name, [0.0, 0])
            sums[0] = sums[0] + size.sum(dtype=torch.float64)
            sums[1] = sums[1] + 3 * mask.sum()

    def means(self, dataset_names: Sequence[str]) -> dict[str, float]:
        """The baseline of each of these sets that has forces, over all ranks (to be called by all of them)."""
        sums = [[float(value) for value in self._sums.get(name, (0.0, 0.0))] for name in dataset_names]
        device = distutils.get_device_for_local_rank()
        total = distutils.all_reduce(torch.tensor(sums, dtype=torch.float64), device=device).tolist()
        return {name: s / n for name, (s, n) in zip(dataset_names, total, strict=True) if n > 0}

    def detach(self) -> None:
        """Take the hook off."""
        self._hook.remove()
