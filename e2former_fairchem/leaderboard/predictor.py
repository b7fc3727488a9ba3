"""Energies and forces of batches of structures from any fairchem checkpoint; one bad structure fails alone."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from fairchem.core import FAIRChemCalculator
from fairchem.core.calculate.pretrained_mlip import available_models, resolve_checkpoint
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit
from fairchem.core.units.mlip_unit.api.inference import guess_inference_settings
from omegaconf import DictConfig, OmegaConf

from e2former_fairchem.training.checkpoint import check_checkpoint_path

#: What fairchem's conversion takes over from a structure although nothing that is predicted depends on it.
LABELS = ("energy", "forces", "stress")

#: Energy in eV and forces [N, 3] in eV/Å, both float64; or why there are none.
Prediction = tuple[float, np.ndarray] | Exception


class PredictionError(RuntimeError):
    """The model gave numbers that are not finite, or of a wrong number."""


def reason(error: Exception) -> str:
    """An exception as the journal keeps it; one without a message (a bare assertion) by where it was raised."""
    name, text, frames = type(error).__name__, str(error), traceback.extract_tb(error.__traceback__)
    if text or not frames:
        return f"{name}: {text}"
    return f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"


def check_model(checkpoint: str | None) -> str:
    """A checkpoint's absolute path, or the name of a model that fairchem downloads.

    Raises:
        ValueError: nothing given, or a file that is no checkpoint.
        FileNotFoundError: neither a file nor a known name.
    """
    if checkpoint is None:
        raise ValueError(
            "checkpoint: expected an inference checkpoint or the name of a model that fairchem knows, got nothing; add "
            "checkpoint=FILE to the command line"
        )
    if checkpoint in available_models:
        return checkpoint
    return str(check_checkpoint_path(checkpoint))


def inference_settings(settings: str | dict[str, Any] | DictConfig, one_composition: bool = False) -> InferenceSettings:
    """Settings from a preset's name, or from changes of the preset `batch`.

    Args:
        settings: see there.
        one_composition: all structures will have the same atoms, charge and spin.

    Raises:
        ValueError: no such preset or key, or one that needs one fixed composition where that is not promised.
    """
    if isinstance(settings, str):
        try:
            found = guess_inference_settings(settings)
        except AssertionError as err:
            raise ValueError(f"inference: expected a preset's name or its keys, got {settings!r}: {err}") from err
    else:
        if isinstance(settings, DictConfig):
            settings = OmegaConf.to_container(settings, resolve=True)
        known = {f.name for f in dataclasses.fields(InferenceSettings)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"inference: expected keys of fairchem's InferenceSettings, got {', '.join(unknown)}")
        found = dataclasses.replace(guess_inference_settings("batch"), **settings)
    if (found.merge_mole or found.nitro) and not one_composition:
        raise ValueError(
            f"inference: expected settings for batches of different molecules (batch, traineval), got {settings!r} "
            f"with merge_mole={found.merge_mole}, nitro={found.nitro}"
        )
    return found


def describe_settings(settings: InferenceSettings) -> dict[str, Any]:
    """The settings as JSON."""
    return {
        k: v if isinstance(v, bool | int | float | None) else sorted(v) if isinstance(v, set | frozenset) else str(v)
        for k, v in dataclasses.asdict(settings).items()
    }


class Predictor:
    """A loaded checkpoint.

    Args:
        checkpoint: path or name, see `check_model`.
        task_name: data set of the checkpoint whose tasks are predicted.
        settings: see `inference_settings`.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: the checkpoint has no energies or no forces for `task_name`.
    """

    def __init__(self, checkpoint: str, task_name: str, settings: InferenceSettings, device: str) -> None:
        found = resolve_checkpoint(checkpoint)
        self.path = Path(found.path)
        self.unit = load_predict_unit(
            found.path,
            settings,
            device=device,
            atom_refs=found.atom_refs,
            form_elem_refs=found.form_elem_refs,
        )
        known = self.unit.dataset_to_tasks
        if task_name not in known:
            raise ValueError(f"task_name: expected one of {', '.join(sorted(known))}, got {task_name!r} ({checkpoint})")
        properties = sorted({task.property for task in known[task_name]})
        if not {"energy", "forces"} <= set(properties):
            raise ValueError(
                f"checkpoint: expected energies and forces for {task_name!r}, got {', '.join(properties)} "
                f"in {checkpoint}"
            )
        self.task_name = task_name
        self.calculator = FAIRChemCalculator(self.unit, task_name=task_name)

    def convert(self, atoms: Atoms) -> AtomicData:
        """Check and convert a structure as fairchem's calculator does; sets charge and spin where they are missing.

        Labels stay behind: structures with and without them could not be collated.

        Raises:
            ValueError: no atoms. And what the model's own check raises.
        """
        if not len(atoms):
            raise ValueError("expected at least one atom, got an empty structure")
        self.unit.validate_atoms_data(atoms, self.task_name)
        bare = atoms.copy()  # without its calculator
        for key in LABELS:
            bare.info.pop(key, None)
        return self.calculator.a2g(bare)

    def predict(self, batch: AtomicData | Sequence[AtomicData]) -> list[Prediction]:
        """One prediction for each structure of a batch, collated or not.

        Where the batch fails as a whole (memory, or one structure that cannot be collated or that the model refuses)
        its halves are tried, down to single structures; a structure that fails alone gives its exception.
        """
        collated = isinstance(batch, AtomicData)
        number = int(batch.num_graphs) if collated else len(batch)
        if not number:
            return []
        try:
            return self._predict_once(batch if collated else atomicdata_list_to_batch(batch))
        except Exception as err:
            if number == 1:
                return [err]
            logging.info("a batch of %d structures failed (%s); trying halves", number, reason(err))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = batch.batch_to_atomicdata_list() if collated else batch
        half = number // 2
        return self.predict(parts[:half]) + self.predict(parts[half:])

    def predict_atoms(self, structures: Sequence[Atoms]) -> list[Prediction]:
        """As `predict`, from ASE structures; one that cannot be converted gives its exception."""
        converted: list[AtomicData | Exception] = []
        for atoms in structures:
            try:
                converted.append(self.convert(atoms))
            except Exception as err:  # whatever a structure brings is its own failure
                converted.append(err)
        good = [data for data in converted if not isinstance(data, Exception)]
        predicted = iter(self.predict(good))
        return [data if isinstance(data, Exception) else next(predicted) for data in converted]

    def _predict_once(self, batch: AtomicData) -> list[Prediction]:
        natoms = batch.natoms.tolist()
        # The unit moves the batch to its device in place; a clone keeps ours as it was.
        output = self.unit.predict(batch.clone())
        energy = output["energy"].detach().reshape(-1).cpu().double().numpy()
        forces = output["forces"].detach().cpu().double().numpy()
        if energy.shape != (len(natoms),) or forces.shape != (sum(natoms), 3):
            raise PredictionError(
                f"expected {len(natoms)} energies and forces [{sum(natoms)}, 3], got {energy.shape} and {forces.shape}"
            )
        found: list[Prediction] = []
        for e, f in zip(energy.tolist(), np.split(forces, np.cumsum(natoms)[:-1]), strict=True):
            if np.isfinite(e) and np.isfinite(f).all():
                found.append((e, f))
            else:
                bad = int(np.count_nonzero(~np.isfinite(f)))
                found.append(PredictionError(f"expected finite numbers, got energy {e} and {bad} bad force components"))
        return found


def pack(natoms: Sequence[int], max_atoms: int, window: int = 1024) -> list[list[int]]:
    """Positions 0..n-1 in batches of at most `max_atoms` atoms (a larger structure comes alone).

    Within a window of consecutive structures they are sorted by size, largest first, so that batches are even and
    reading stays local. Single atoms come alone: fairchem looks those up for models that cannot predict them.
    """
    batches: list[list[int]] = []
    for start in range(0, len(natoms), window):
        order = sorted(range(start, min(start + window, len(natoms))), key=lambda i: (-natoms[i], i))
        batch: list[int] = []
        total = 0
        for i in order:
            if batch and (total + natoms[i] > max_atoms or natoms[i] == 1):
                batches.append(batch)
                batch, total = [], 0
            batch.append(i)
            total += natoms[i]
        batches.append(batch)
    return batches
