"""Errors of a checkpoint on a data set, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.db import connect
from ase.stress import voigt_6_to_full_3x3_stress
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.units.mlip_unit import MLIPPredictUnit, load_predict_unit

from e2former_fairchem.data.checks import count_structures
from e2former_fairchem.data.references import reference_energy, spread

#: Structures of a data set that are compared, evenly spread.
MAX_COMPARED = 2000
BATCH_ATOMS = 512


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors on a data set.

    structures: compared, of so many. energy: eV/atom. forces: eV/Å, by component. zero_forces: the same error of
    predicting zero. stress: eV/Å^3, by component, or None.
    """

    structures: int
    of: int
    energy: float
    forces: float
    zero_forces: float
    stress: float | None


@dataclass(frozen=True)
class Predictions:
    """Of a checkpoint: total energies (eV), forces (eV/Å) and stress (eV/Å^3, [3, 3]; None where it has none)."""

    energies: np.ndarray
    forces: list[np.ndarray]
    stress: list[np.ndarray] | None


def read_spread(folder: Path, limit: int = MAX_COMPARED) -> tuple[list[Atoms], int]:
    """At most `limit` structures of a written data set, evenly spread, and how many it has."""
    size = count_structures(str(folder))
    with connect(str(folder / "data.aselmdb"), readonly=True, use_lock_file=False) as database:
        structures = []
        for number in spread(size, limit).tolist():
            row = database.get(id=number + 1)
            atoms = row.toatoms()
            atoms.info.update(row.data)
            structures.append(atoms)
    return structures, size


def load(checkpoint: str | Path, device: str) -> MLIPPredictUnit:
    """A checkpoint for predictions without compilation; device: `cpu` or `cuda`."""
    return load_predict_unit(str(checkpoint), inference_settings="traineval", device=device)


def predict(unit: MLIPPredictUnit, structures: Iterable[Atoms]) -> Predictions:
    """Energies, forces and, where the checkpoint has it, stress."""
    task = "omol" if "omol" in unit.dataset_to_tasks else next(iter(unit.dataset_to_tasks))
    energies, forces, stress = [], [], []
    for group in _batches(structures):
        batch = atomicdata_list_to_batch(
            [AtomicData.from_ase(atoms, task_name=task, r_data_keys=["spin", "charge"]) for atoms in group]
        )
        found = unit.predict(batch)
        energies += found["energy"].detach().double().flatten().tolist()
        forces += list(
            np.split(found["forces"].detach().cpu().double().numpy(), np.cumsum([len(a) for a in group])[:-1])
        )
        if "stress" in found:
            stress += list(found["stress"].detach().cpu().double().numpy().reshape(-1, 3, 3))
    return Predictions(np.array(energies), forces, stress or None)


def _batches(structures: Iterable[Atoms]) -> Iterator[list[Atoms]]:
    group: list[Atoms] = []
    for atoms in structures:
        if group and sum(map(len, group)) + len(atoms) > BATCH_ATOMS:
            yield group
            group = []
        group.append(atoms)
    if group:
        yield group


def compare(structures: list[Atoms], size: int, predicted: Predictions, shift: np.ndarray | None = None) -> Errors:
    """Errors against the structures' labels. shift: references added to the energies, eV."""
    natoms = np.array([len(atoms) for atoms in structures])
    energies = predicted.energies + (0 if shift is None else [reference_energy(shift, atoms) for atoms in structures])
    labels = [atoms.calc.results for atoms in structures]
    forces = np.concatenate([label["forces"] for label in labels])
    stress = None
    if predicted.stress is not None and all("stress" in label for label in labels):
        given = np.array([voigt_6_to_full_3x3_stress(label["stress"]) for label in labels])
        stress = float(np.abs(np.array(predicted.stress) - given).mean())
    return Errors(
        len(structures),
        size,
        float(np.abs((energies - [label["energy"] for label in labels]) / natoms).mean()),
        float(np.abs(np.concatenate(predicted.forces) - forces).mean()),
        float(np.abs(forces).mean()),
        stress,
    )


def device() -> str:
    """Where to compare: the GPU where torch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_table(rows: Mapping[str, Errors]) -> str:
    """The table as text; rows: what was compared, by name."""
    with_stress = any(errors.stress is not None for errors in rows.values())
    head = ["mean absolute error", "structures", "energy, meV/atom", "forces, eV/Å", "of zero forces"]
    lines = [head + (["stress, meV/Å^3"] if with_stress else [])]
    for name, errors in rows.items():
        share = 100 * errors.forces / errors.zero_forces if errors.zero_forces else float("nan")
        of = f"{errors.structures:,}" + (f" of {errors.of:,}" if errors.of > errors.structures else "")
        cells = [name, of, f"{1000 * errors.energy:.1f}", f"{errors.forces:.4f}", f"{share:.1f} %"]
        if with_stress:
            cells.append("" if errors.stress is None else f"{1000 * errors.stress:.3f}")
        lines.append(cells)
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def as_content(rows: Mapping[str, Errors]) -> dict[str, dict]:
    """The table for a JSON file."""
    return {name: asdict(errors) for name, errors in rows.items()}
