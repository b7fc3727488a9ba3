"""Errors on one validation set, added up batch by batch in memory that does not grow with the set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2former_fairchem.data.references import NUM_ELEMENTS
from e2former_fairchem.report.sample import EDGES, Sample, histogram

#: Points of the parity plots, and structures in each list of the worst.
SAMPLE_SIZE, WORST = 200_000, 15

# What is summed. Energies in eV and eV/atom, forces by component in eV/Å, stress by component in eV/Å^3.
ENERGY_SUMS = ("count", "abs", "square", "signed", "abs_total", "reference", "reference_square")
FORCE_SUMS = ("count", "abs", "square", "reference_abs", "reference", "reference_square", "cosine", "atoms")
STRESS_SUMS = ("count", "abs", "square")
GROUP_SUMS = ("structures", "energy_count", "energy_abs", "force_count", "force_abs", "force_reference_abs")
ELEMENT_SUMS = ("atoms", "count", "abs", "square", "reference_abs")
WORST_NUMBERS = ("index", "atoms", "charge", "spin", "energy_error", "force_mae", "force_max")


@dataclass
class Predictions:
    """Predictions for structures of one set, and the labels; NaN labels are left out.

    Args:
        index: [B], place of each structure in the data loader's data set; -1 where it is unknown.
        numbers: [N], atomic numbers.
        natoms: [B].
        charge: [B], total charge in e.
        spin: [B], spin multiplicity, 0 where it is not given.
        energy: [B, 2], reference and prediction in eV, without the energies of the elements; None for no energy task.
        forces: [N, 2, 3], reference and prediction, eV/Å; None for no force task.
        stress: [B, 2, 9], reference and prediction, eV/Å^3; None for no stress task.
    """

    index: NDArray[np.int64]
    numbers: NDArray[np.int64]
    natoms: NDArray[np.int64]
    charge: NDArray[np.int64]
    spin: NDArray[np.int64]
    energy: NDArray[np.float64] | None = None
    forces: NDArray[np.float64] | None = None
    stress: NDArray[np.float64] | None = None


def formula(numbers: NDArray) -> str:
    """Hill's formula, e.g. `C2H6O`."""
    from ase import Atoms

    return Atoms(numbers=numbers).get_chemical_formula()


class SetErrors:
    """Sums, histograms, a sample and the worst structures of one validation set.

    `merge` makes one of several ranks'; `to_arrays` and `from_arrays` are for files and for sending.

    Args:
        name: of the set, as the data set calls it.
        seed: of the random samples; another one on each rank.
        sample_size: points to keep for the parity plots, of energies and of force components.
    """

    def __init__(self, name: str, seed: tuple[int, ...] = (0,), sample_size: int = SAMPLE_SIZE) -> None:
        self.name = name
        self.referenced = True
        self.structures = 0
        self.atoms = 0
        self.nonfinite = 0
        self.energy = np.zeros(len(ENERGY_SUMS))
        self.forces = np.zeros(len(FORCE_SUMS))
        self.stress = np.zeros(len(STRESS_SUMS))
        self.energy_histogram = np.zeros(len(EDGES) - 1, np.int64)
        self.force_histogram = np.zeros(len(EDGES) - 1, np.int64)
        self.energy_sample = Sample(sample_size, 2, (*seed, 0))
        self.force_sample = Sample(sample_size, 2, (*seed, 1))
        self.elements = np.zeros((NUM_ELEMENTS + 1, len(ELEMENT_SUMS)))
        self.states: dict[tuple[int, int], NDArray] = {}
        self.sizes: dict[tuple[int, ...], NDArray] = {}
        self.worst_energy = (np.empty((0, len(WORST_NUMBERS))), np.empty(0, "U1"))
        self.worst_forces = (np.empty((0, len(WORST_NUMBERS))), np.empty(0, "U1"))

    def add(self, batch: Predictions) -> None:
        """Add structures. Those with a prediction that is not finite are counted and left out of everything else."""
        size = len(batch.natoms)
        owner = np.repeat(np.arange(size), batch.natoms)
        broken = np.zeros(size, bool)
        energy = np.full((size, 2), np.nan) if batch.energy is None else batch.energy
        forces = np.full((len(owner), 2, 3), np.nan) if batch.forces is None else batch.forces
        if batch.energy is not None:
            broken |= np.isfinite(energy[:, 0]) & ~np.isfinite(energy[:, 1])
        if batch.forces is not None:
            bad = np.isfinite(forces[:, 0]).all(1) & ~np.isfinite(forces[:, 1]).all(1)
            broken |= np.bincount(owner, bad, size) > 0
        if batch.stress is not None:
            broken |= np.isfinite(batch.stress[:, 0]).all(1) & ~np.isfinite(batch.stress[:, 1]).all(1)
        self.structures += size
        self.atoms += int(batch.natoms.sum())
        self.nonfinite += int(broken.sum())
        has_energy = np.isfinite(energy).all(1) & ~broken
        has_forces = np.isfinite(forces).all((1, 2)) & ~broken[owner]

        per_atom = energy / batch.natoms[:, None]
        self._add_energies(per_atom[has_energy], batch.natoms[has_energy])
        difference = np.where(has_forces[:, None], forces[:, 1] - forces[:, 0], 0.0)
        reference = np.where(has_forces[:, None], forces[:, 0], 0.0)
        self._add_forces(forces[has_forces], batch.numbers[has_forces])

        if batch.stress is not None:
            counted = batch.stress[np.isfinite(batch.stress).all((1, 2)) & ~broken]
            error = counted[:, 1] - counted[:, 0]
            self.stress += [error.size, np.abs(error).sum(), (error**2).sum()]

        # sums for each structure, from which groups and worst structures follow
        energy_error = np.where(has_energy, per_atom[:, 1] - per_atom[:, 0], 0.0)
        count = 3 * np.bincount(owner, has_forces, size)
        force_abs = np.bincount(owner, np.abs(difference).sum(1), size)
        reference_abs = np.bincount(owner, np.abs(reference).sum(1), size)
        rows = np.stack([np.ones(size), has_energy, np.abs(energy_error), count, force_abs, reference_abs], 1)
        _add_rows(self.states, np.stack([batch.charge, batch.spin], 1)[~broken], rows[~broken])
        _add_rows(self.sizes, batch.natoms[~broken, None], rows[~broken])

        longest = np.zeros(size)
        np.maximum.at(longest, owner, np.linalg.norm(difference, axis=1))
        mae = force_abs / np.maximum(count, 1)
        numbers = np.stack([batch.index, batch.natoms, batch.charge, batch.spin, energy_error, mae, longest], 1).astype(
            np.float64
        )
        starts = np.cumsum(batch.natoms) - batch.natoms
        for name, score, counted in (
            ("worst_energy", np.abs(energy_error), has_energy),
            ("worst_forces", mae, count > 0),
        ):
            candidates = np.flatnonzero(counted)
            best = candidates[np.argsort(-score[candidates], kind="stable")[:WORST]]
            names = [formula(batch.numbers[starts[i] : starts[i] + batch.natoms[i]]) for i in best]
            setattr(self, name, _worst(getattr(self, name), (numbers[best], np.array(names, "U64")), name))

    def _add_energies(self, per_atom: NDArray, natoms: NDArray) -> None:
        error = per_atom[:, 1] - per_atom[:, 0]
        reference = per_atom[:, 0]
        sums = (
            np.ones_like(error),
            np.abs(error),
            error**2,
            error,
            np.abs(error) * natoms,
            reference,
            reference**2,
        )
        self.energy += [column.sum() for column in sums]
        self.energy_histogram += histogram(np.abs(error))
        self.energy_sample.add(per_atom)

    def _add_forces(self, forces: NDArray, numbers: NDArray) -> None:
        reference, predicted = forces[:, 0], forces[:, 1]
        error = predicted - reference
        lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(predicted, axis=1)
        cosine = (reference * predicted).sum(1) / np.maximum(lengths, 1e-30)
        self.forces += [
            error.size,
            np.abs(error).sum(),
            (error**2).sum(),
            np.abs(reference).sum(),
            reference.sum(),
            (reference**2).sum(),
            cosine.sum(),
            len(error),
        ]
        self.force_histogram += histogram(np.abs(error).ravel())
        self.force_sample.add(np.stack([reference.ravel(), predicted.ravel()], 1))
        columns = (None, 3.0, np.abs(error).sum(1), (error**2).sum(1), np.abs(reference).sum(1))
        for i, column in enumerate(columns):
            weights = None if column is None else np.broadcast_to(column, numbers.shape)
            self.elements[:, i] += np.bincount(numbers, weights, NUM_ELEMENTS + 1)[: NUM_ELEMENTS + 1]

    def merge(self, other: SetErrors) -> None:
        """Add another rank's errors on the same set."""
        self.referenced &= other.referenced
        for name in ("structures", "atoms", "nonfinite", "energy", "forces", "stress"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("energy_histogram", "force_histogram"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.elements = self.elements + other.elements
        for name in ("energy_sample", "force_sample"):
            getattr(self, name).merge(getattr(other, name))
        for name in ("states", "sizes"):
            mine = getattr(self, name)
            for key, row in getattr(other, name).items():
                mine[key] = mine.get(key, 0.0) + row
        for name in ("worst_energy", "worst_forces"):
            setattr(self, name, _worst(getattr(self, name), getattr(other, name), name))

    def to_arrays(self) -> dict[str, NDArray]:
        """Everything as arrays without Python objects."""
        arrays = {
            "counts": np.array([self.structures, self.atoms, self.nonfinite, self.referenced], np.int64),
            "energy": self.energy,
            "forces": self.forces,
            "stress": self.stress,
            "energy_histogram": self.energy_histogram,
            "force_histogram": self.force_histogram,
            "elements": self.elements,
        }
        for name in ("energy_sample", "force_sample"):
            sample = getattr(self, name)
            arrays |= {name: sample.rows, f"{name}_keys": sample.keys}
        for name, width in (("states", 2), ("sizes", 1)):
            table = getattr(self, name)
            arrays[f"{name}_keys"] = np.array(sorted(table), np.int64).reshape(-1, width)
            arrays[name] = np.array([table[key] for key in sorted(table)]).reshape(-1, len(GROUP_SUMS))
        for name in ("worst_energy", "worst_forces"):
            arrays[name], arrays[f"{name}_formulas"] = getattr(self, name)
        return arrays

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, NDArray]) -> SetErrors:
        """The inverse of `to_arrays`."""
        new = cls(name)
        new.structures, new.atoms, new.nonfinite = (int(n) for n in arrays["counts"][:3])
        new.referenced = bool(arrays["counts"][3])
        for key in ("energy", "forces", "stress", "energy_histogram", "force_histogram", "elements"):
            if key in arrays or key != "stress":  # files of earlier versions have none
                setattr(new, key, arrays[key])
        for key in ("energy_sample", "force_sample"):
            sample = getattr(new, key)
            sample.rows, sample.keys = arrays[key], arrays[f"{key}_keys"]
        for key in ("states", "sizes"):
            keys = [tuple(int(i) for i in row) for row in arrays[f"{key}_keys"]]
            setattr(new, key, dict(zip(keys, arrays[key], strict=True)))
        for key in ("worst_energy", "worst_forces"):
            setattr(new, key, (arrays[key], arrays[f"{key}_formulas"]))
        return new


def _add_rows(table: dict[tuple[int, ...], NDArray], keys: NDArray, rows: NDArray) -> None:
    if len(keys) == 0:
        return
    found, inverse = np.unique(keys, axis=0, return_inverse=True)
    sums = np.zeros((len(found), rows.shape[1]))
    np.add.at(sums, inverse.reshape(-1), rows)
    for key, row in zip(found, sums, strict=True):
        name = tuple(int(i) for i in key)
        table[name] = table.get(name, 0.0) + row


def _worst(mine: tuple, other: tuple, name: str) -> tuple[NDArray, NDArray]:
    """The worst of two lists, each structure once: samplers of several ranks repeat some."""
    numbers, formulas = np.concatenate([mine[0], other[0]]), np.concatenate([mine[1], other[1]])
    column = WORST_NUMBERS.index("energy_error" if name == "worst_energy" else "force_mae")
    kept: list[int] = []
    seen = set()
    for i in np.argsort(-np.abs(numbers[:, column]), kind="stable"):
        index = int(numbers[i, 0])
        if index >= 0 and index in seen:
            continue
        seen.add(index)
        kept.append(int(i))
        if len(kept) == WORST:
            break
    return numbers[kept], formulas[kept]
