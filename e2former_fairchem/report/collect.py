"""Errors from the predictions of an evaluation that runs anyway: nothing is predicted twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fairchem.core.common import distutils, gp_utils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import Task
from torch import Tensor
from torchtnt.framework.state import State
from torchtnt.framework.unit import TEvalUnit

from e2former_fairchem.compat import dataset_and_row
from e2former_fairchem.report.errors import SAMPLE_SIZE, Predictions, SetErrors
from e2former_fairchem.training.recorders import task_of, valid


class ErrorCollector:
    """Listens to the model that is evaluated (the averaged weights in a training run) and adds its errors up.

    Predictions become physical as in fairchem's metrics (normaliser, element references, masks of missing labels and
    of fixed atoms), and structures count as they do there: what samplers repeat to fill the last batches of several
    ranks counts twice. Energies are kept without the energies of the elements. Tasks for other properties are left out.

    A failure in here never stops the evaluation: it is kept in `failure`, and nothing more is collected.

    Args:
        unit: fairchem's evaluation unit, or its training unit.
        state: torchtnt's state, which has the data loader.
        seed: of the random samples.
        sample_size: points to keep for each parity plot.
    """

    def __init__(self, unit: TEvalUnit, state: State, seed: int = 0, sample_size: int = SAMPLE_SIZE) -> None:
        self.failure: Exception | None = None
        unit = getattr(unit, "eval_unit", unit)
        loader = state.eval_state.dataloader
        self.tasks = unit.tasks
        self.sets = {
            name: SetErrors(name, (seed, distutils.get_rank(), i), sample_size)
            for i, name in enumerate(loader.dataset.dataset_names)
        }
        # A batch does not tell which structures it holds. Its sampler does, where it is not random.
        sampler = getattr(loader, "batch_sampler", None)
        self._indices = iter(sampler if sampler is not None else ())
        self._hook = unit.model.register_forward_hook(self._listen)

    def detach(self) -> None:
        """Stop listening."""
        self._hook.remove()

    def _listen(self, _module: Any, inputs: tuple, output: dict) -> None:
        if self.failure is not None:
            return
        try:
            self._add(inputs[0], output)
        except Exception as err:  # whatever it is, the training is worth more than its report
            self.failure = err

    def _add(self, batch: AtomicData, output: dict[str, dict[str, Tensor]]) -> None:
        if gp_utils.initialized() and gp_utils.get_gp_rank() > 0:
            return  # workers of one graph have the same predictions: one of them counts
        size = len(batch.natoms)
        # in graph parallelism a backbone may have left each worker its own atoms only
        numbers = batch.atomic_numbers_full if "atomic_numbers_full" in batch else batch.atomic_numbers
        names = np.array(batch.dataset_name)
        natoms = batch.natoms.cpu().numpy()
        index = np.array(next(self._indices, ()), np.int64)
        whole = Predictions(
            index=index if len(index) == size else np.full(size, -1),
            numbers=numbers.cpu().numpy(),
            natoms=natoms,
            charge=batch.charge.cpu().numpy().reshape(-1).astype(np.int64),
            spin=batch.spin.cpu().numpy().reshape(-1).astype(np.int64),
        )
        owner = np.repeat(np.arange(size), natoms)
        for name in set(batch.dataset_name):
            rows = names == name
            energy = task_of(self.tasks, "energy", name)
            forces = task_of(self.tasks, "forces", name)
            stress = task_of(self.tasks, "stress", name)
            if energy is not None:
                self.sets[name].referenced &= energy.element_references is not None
            self.sets[name].add(
                Predictions(
                    index=whole.index[rows],
                    numbers=whole.numbers[rows[owner]],
                    natoms=natoms[rows],
                    charge=whole.charge[rows],
                    spin=whole.spin[rows],
                    energy=None if energy is None else _energies(energy, name, batch, output)[rows],
                    forces=None if forces is None else _physical(forces, name, batch, output)[rows[owner]],
                    stress=None if stress is None else _physical(stress, name, batch, output)[rows].reshape(-1, 2, 9),
                )
            )


def _pair(task: Task, name: str, batch: AtomicData, target: Tensor, predicted: Tensor) -> np.ndarray:
    """Labels and predictions [n, 2, ...] in float64 on the CPU, labels that do not count as NaN; one transfer."""
    pair = torch.stack([target.double(), predicted.detach().double().view_as(target)], 1)
    mask = valid(batch, task, name).view(len(pair), -1).all(1)  # of stress it has nine columns
    mask = mask.view(-1, *[1] * (pair.dim() - 1))
    return torch.where(mask, pair, torch.nan).cpu().numpy()


def _energies(task: Task, name: str, batch: AtomicData, output: dict) -> np.ndarray:
    # subtracting the elements in float64 before anything else: totals in float32 are coarse
    target = batch[task.name].double().view(-1)
    if task.element_references is not None:
        target = task.element_references.apply_refs(batch, target)
    return _pair(task, name, batch, target, task.normalizer.denorm(output[task.name][task.property]))


def _physical(task: Task, name: str, batch: AtomicData, output: dict) -> np.ndarray:
    return _pair(task, name, batch, batch[task.name], task.normalizer.denorm(output[task.name][task.property]))


def gather(collector: ErrorCollector) -> list[SetErrors] | None:
    """The errors of all ranks on rank 0, None on the others; to be called by all of them.

    Raises:
        RuntimeError: collecting failed on some rank (on rank 0 only).
    """
    failure = None if collector.failure is None else f"{type(collector.failure).__name__}: {collector.failure}"
    mine = {} if failure else {name: errors.to_arrays() for name, errors in collector.sets.items()}
    ranks = distutils.gather_objects((failure, mine))
    if ranks is None or not distutils.is_master():
        return None
    for rank, (message, _) in enumerate(ranks):
        if message is not None:
            raise RuntimeError(f"errors were not collected on rank {rank}: {message}")
    merged = []
    for name in collector.sets:
        total, *others = [SetErrors.from_arrays(name, arrays[name]) for _, arrays in ranks]
        for other in others:
            total.merge(other)
        merged.append(total)
    return merged


def structure_name(dataset: Any, index: int) -> str:
    """What identifies a structure: OMol25's `source` where its row has one, else its number in its part of the data."""
    try:
        part, row = dataset_and_row(dataset, index)
        subset = dataset.datasets[part]
        inner = int(subset.indices[row])
    except (AttributeError, IndexError, TypeError):
        return f"#{index}"
    try:
        return str(subset.dataset.get_atoms(inner).info.get("source") or f"#{inner}")
    except Exception:  # foreign data sets fail in their own ways; the number is enough
        return f"#{inner}"
