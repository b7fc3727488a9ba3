"""Labels of training and validation data: checked before the first step, and in every batch.

fairchem leaves labels that are not finite out of the loss without a word, ends in an attribute error where one is
missing, and trains on whatever the element references leave of the energies. The data loader and the collater here take
the places of fairchem's in our configs.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from fairchem.core.common import distutils
from fairchem.core.components.common import dataloader_builder
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset
from fairchem.core.units.mlip_unit.mlip_unit import DEFAULT_EXCLUDE_KEYS, Task, mt_collater_adapter
from torch import Tensor
from torch.utils.data import DataLoader

from e2former_fairchem.data.references import spread
from e2former_fairchem.training.arguments import positive

BAD_LABELS = ("refuse", "mask")
#: Structures of a data set that are checked before the first step, evenly spread; batches are checked as they come.
MAX_CHECKED = 4096
#: A single structure may have so many times the residual that is allowed for the median: a bare ion is far from its
#: element's reference (Fe3+: 55 eV), a label in another unit much farther.
OUTLIER_FACTOR = 10.0
_NAMED = 5


class LabelCollater:
    """fairchem's collater, which refuses structures without usable labels, by name.

    A label is what a task of the structure's data set is trained on or compared with. An energy is not usable either
    where the element references of its task do not cover the structure.

    Args:
        tasks: of the training or the evaluation.
        bad_labels: `refuse` labels that are missing or not finite, or `mask` them: they count in no loss and no metric.
        exclude_keys: see fairchem's `mt_collater_adapter`.

    Raises:
        ValueError: another value of `bad_labels`; when called, a structure that is refused, or without a task.
    """

    def __init__(
        self, tasks: Sequence[Task], bad_labels: str = "refuse", exclude_keys: Sequence[str] = DEFAULT_EXCLUDE_KEYS
    ) -> None:
        if bad_labels not in BAD_LABELS:
            raise ValueError(f"bad_labels: expected {' or '.join(BAD_LABELS)}, got {bad_labels!r}")
        self.bad_labels = bad_labels
        self.exclude_keys = list(exclude_keys)
        self._collate = mt_collater_adapter(tasks, exclude_keys)
        self._names = [task.name for task in tasks]
        self._tasks: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            if not task.inference_only:
                for dataset in task.datasets:
                    self._tasks[dataset].append(task)

    def __call__(self, structures: Sequence[AtomicData]) -> AtomicData:
        """The batch of these structures."""
        for data in structures:
            self.tasks_of(data)
        # fairchem's collater copies every structure before it fills in labels of other data sets
        complete = all(hasattr(data, name) for data in structures for name in self._names)
        if complete or all(hasattr(data, task.name) for data in structures for task in self.tasks_of(data)):
            batch = atomicdata_list_to_batch(structures, self.exclude_keys) if complete else self._collate(structures)
            if self._is_sound(batch):
                return batch
        problems = [(n, task, text) for n, data in enumerate(structures) for task, text in self.problems(data)]
        if problems and self.bad_labels == "refuse":
            raise ValueError(_refusal([(name_of(structures[n]), text) for n, _, text in problems]))
        structures = list(structures)
        for n, task, _ in problems:
            structures[n] = _masked(structures[n], task)
        return self._collate(structures)

    def _is_sound(self, batch: AtomicData) -> bool:
        """Whether every label is usable, seen at once. In batches of several data sets fairchem fills some with inf."""
        return all(
            bool(batch[task.name].isfinite().all()) and covered(references_of(task), batch.atomic_numbers)
            for tasks in self._tasks.values()
            for task in tasks
        )

    def tasks_of(self, data: AtomicData) -> list[Task]:
        """The tasks of a structure's data set.

        Raises:
            ValueError: it has none.
        """
        name = data.dataset if isinstance(data.dataset, str) else data.dataset[0]
        if name not in self._tasks:
            raise ValueError(
                f"tasks: expected some for the data set {name!r} of {name_of(data)}, got tasks for "
                f"{', '.join(sorted(self._tasks)) or 'none'}"
            )
        return self._tasks[name]

    def problems(self, data: AtomicData) -> Iterator[tuple[Task, str]]:
        """Labels of a structure that are not usable: the task, and what is wrong."""
        for task in self.tasks_of(data):
            label = getattr(data, task.name, None)
            if label is None:
                yield task, f"no {task.property} ({task.name})"
            elif not bool(label.isfinite().all()):
                yield task, f"{task.property} not finite ({task.name})"
            elif not covered(references_of(task), data.atomic_numbers):
                elements = ", ".join(_uncovered(references_of(task), data.atomic_numbers))
                yield task, f"elements without a reference ({task.name}): {elements}"


def references_of(task: Task) -> Tensor | None:
    """Element references of an energy task, eV by atomic number (0: charge), or None where it has none."""
    return None if task.element_references is None else task.element_references.element_references


def covered(references: Tensor | None, numbers: Tensor) -> bool:
    """Whether all of these elements have a reference, or none is needed."""
    return references is None or (int(numbers.max()) < len(references) and bool(references[numbers].isfinite().all()))


def _uncovered(references: Tensor, numbers: Tensor) -> list[str]:
    elements = sorted(set(numbers.tolist()))
    return [chemical_symbols[z] for z in elements if z >= len(references) or not references[z].isfinite()]


def name_of(data: AtomicData) -> str:
    """What to call a structure in a message: its id in its data set, or its formula where it has none."""
    sid = data.sid[0] if isinstance(data.sid, list) else data.sid
    where = getattr(data, "dataset_name", None) or data.dataset
    return f"structure {sid} of {where}" if sid else f"a structure of {int(data.natoms)} atoms of {where}"


def _masked(data: AtomicData, task: Task) -> AtomicData:
    """A copy whose label of a task is infinite, which fairchem's masks leave out."""
    masked = data.clone()
    masked.dataset = data.dataset  # a clone's is a list, which fairchem's collater cannot look up
    if getattr(data, task.name, None) is None or task.level == "system":
        shape = [int(data.natoms)] if task.level == "atom" else []
        setattr(masked, task.name, torch.full([*shape, *task.out_spec.dim], torch.inf, dtype=data.pos.dtype))
    return masked


def _refusal(problems: Sequence[tuple[str, str]]) -> str:
    named = "; ".join(f"{name}: {text}" for name, text in problems[:_NAMED])
    more = f"; {len(problems)} in all" if len(problems) > _NAMED else ""
    return (
        f"labels: expected finite ones for every task and structure, got {named}{more}. "
        "dataset.bad_labels=mask leaves such labels out of losses and errors"
    )


def check_labels(dataset: ConcatDataset, collater: LabelCollater, max_energy_residual: float | None = 10.0) -> None:
    """Check labels and energies of at most `MAX_CHECKED` structures of a data set, spread over it.

    Args:
        dataset: of the data loader.
        collater: knows the tasks, and whether unusable labels are refused or counted in a warning.
        max_energy_residual: what the element references may leave of the energies, eV per atom: the median of a set
            may be so large, a single structure's ten times as large. References of isolated atoms leave the atomisation
            energy, less than 9 eV per atom; wrong references or another unit leave hundreds. None checks nothing.

    Raises:
        ValueError: labels that are refused, or energies that the references do not fit.
    """
    chosen = spread(len(dataset), MAX_CHECKED)
    problems: list[tuple[str, str]] = []
    residuals: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    sources: dict[str, Any] = dict(zip(dataset.dataset_names, (d.config["src"] for d in dataset.datasets), strict=True))
    for n in chosen.tolist():
        data = dataset[n]
        bad = list(collater.problems(data))
        problems += [(name_of(data), text) for _, text in bad]
        for task in collater.tasks_of(data):
            if task.property == "energy" and all(task is not other for other, _ in bad):
                residuals[data.dataset_name, task.name].append((residual(data, task), name_of(data)))
    if problems:
        if collater.bad_labels == "refuse":
            raise ValueError(f"{_refusal(problems)} ({len(chosen):,} of {len(dataset):,} structures were checked)")
        _log(
            logging.warning,
            f"{len(problems):,} labels of {len(chosen):,} checked structures (of {len(dataset):,}) are left out of "
            f"losses and errors: {'; '.join(f'{name}: {text}' for name, text in problems[:_NAMED])}",
        )
    for (name, task), found in residuals.items():
        check_residuals(found, name, sources[name], task, max_energy_residual)


def residual(data: AtomicData, task: Task) -> float:
    """Energy less the element references, eV per atom."""
    energy = getattr(data, task.name).double().sum()
    if (references := references_of(task)) is not None:
        energy = energy - references.double()[data.atomic_numbers].sum() - float(data.charge) * float(references[0])
    return float(energy) / int(data.natoms)


def check_residuals(
    found: Sequence[tuple[float, str]], name: str, source: Any, task: str, allowed: float | None
) -> None:
    """Refuse data of which the element references leave more of the energies than is allowed; see `check_labels`.

    Args:
        found: residual (eV per atom) and name of each structure.
        name: of the data set, as the next two for the message.
        source: where it lies.
        task: name of the task.
        allowed: eV per atom; None allows everything.

    Raises:
        ValueError: more is left.
    """
    sizes = np.abs([value for value, _ in found])
    median, largest = float(np.median(sizes)), int(sizes.argmax())
    summary = (
        f"{name}: {task} less the element references has a median size of {median:.3g} eV/atom over {len(found):,} "
        f"structures, the largest {sizes[largest]:.3g} eV/atom ({found[largest][1]})"
    )
    if allowed is None or (median <= allowed and sizes[largest] <= OUTLIER_FACTOR * allowed):
        _log(logging.info, summary)
        return
    raise ValueError(
        f"element_references: {summary}; expected at most {allowed:g} (median) and {OUTLIER_FACTOR * allowed:g} (one "
        "structure). The references are of other data, another level of theory or another unit than these energies, "
        f"which must be in eV. Fit them: e2former-fairchem fit-references {source} -o references.json, then "
        "element_references=references.json (tasks=from_checkpoint takes the checkpoint's instead). "
        "dataset.max_energy_residual=NUMBER allows more"
    )


def _log(log: Callable[[str], None], message: str) -> None:
    if distutils.is_master():
        log(message)


def get_dataloader(
    dataset: ConcatDataset,
    batch_sampler_fn: partial,
    collate_fn: LabelCollater,
    num_workers: int,
    max_energy_residual: float | None = 10.0,
) -> DataLoader:
    """fairchem's `get_dataloader` after `check_labels`; every rank checks, so that all of them stop. Its workers stay.

    Structures that fairchem's sampler leaves out because they are larger than a batch are counted in a warning.

    Args:
        dataset: of structures.
        batch_sampler_fn: as for fairchem's.
        collate_fn: knows the tasks.
        num_workers: of the loader.
        max_energy_residual: eV per atom; None does not ask.

    Raises:
        ValueError: as `check_labels`, and for a limit that is no positive number.
    """
    if max_energy_residual is not None:
        positive("max_energy_residual", max_energy_residual)
    check_labels(dataset, collate_fn, max_energy_residual)
    loader = dataloader_builder.get_dataloader(dataset, batch_sampler_fn, collate_fn, num_workers)
    if num_workers:  # fairchem starts them anew for every epoch
        loader = DataLoader(
            dataset,
            batch_sampler=loader.batch_sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            # a rank of several starts processes anew ("spawn"), which would have to send them open databases
            multiprocessing_context="fork",
            pin_memory=loader.pin_memory,
            persistent_workers=True,
        )
    batches = getattr(loader.batch_sampler, "all_batches", None)  # fairchem's sampler by atoms says it on level info
    if batches is not None and (left_out := len(dataset) - sum(map(len, batches))):
        _log(
            logging.warning,
            f"{left_out:,} of {len(dataset):,} structures of {', '.join(dataset.dataset_names)} have more than "
            f"{loader.batch_sampler.max_atoms:,} atoms (max_atoms) and are left out",
        )
    return loader
