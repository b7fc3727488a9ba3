"""Element references: reading them from a file, and fitting them to a data set.

A table is [119], eV by atomic number; entry 0 is the energy per unit of a structure's charge, zero where there is none.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

NUM_ELEMENTS = 118
#: Tables that come with the package, by name: of the authors' heads (data/README.md) and of the bundled sample.
BUNDLED = {"sample": Path(__file__).with_name("sample") / "statistics.json"}
BUNDLED |= {path.stem: path for path in sorted(Path(__file__).with_name("element_references").glob("*.json"))}


def dense_table(table: Mapping[int, float], default: float = math.nan) -> list[float]:
    """Energies by atomic number, [119], from those of some elements, and of the charge (0)."""
    return [float(table.get(0, 0.0)), *(float(table.get(z, default)) for z in range(1, NUM_ELEMENTS + 1))]


def reference_energy(table: np.ndarray, atoms: Atoms) -> float:
    """Energy that a table gives a structure, eV; its charge is in ``info`` (0 where it is not)."""
    return float(table[atoms.numbers].sum() + atoms.info.get("charge", 0) * table[0])


def read_element_references(location: str | Path, key: str = "references") -> list[float]:
    """Element references from a JSON file.

    Args:
        location: a file with an object ``{"1": -13.6, ...}`` or a list by atomic number, either of them also as the
            entry ``element_references`` of an object with more in it, of which ``charge_reference`` is the energy per
            unit of charge (in a list: entry 0); eV.
        key: config key or argument, for messages.

    Returns:
        Energies by atomic number, eV, [119] (entry 0: per unit of charge); NaN for elements that are not there or null.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = Path(location)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: expected a JSON file, got {path}, which does not exist or is no file")
    try:
        content = json.loads(path.read_text())
    except ValueError as err:  # no JSON, or no text
        raise ValueError(f"{key}: expected JSON in {path}, got {err}") from err
    charge = None
    if isinstance(content, Mapping):
        charge = content.get("charge_reference")
        content = content.get("element_references", content)
    if isinstance(content, Mapping) and content and all(str(name).isdigit() for name in content):
        table = {int(name): value for name, value in content.items()}
    elif isinstance(content, Sequence) and not isinstance(content, str) and len(content) > 1:
        table = dict(enumerate(content))
    else:
        raise ValueError(
            f"{key}: expected in {path} a list of energies in eV by atomic number (entry 0: per unit of charge) or an "
            f'object {{"1": -13.6, ...}}, or either under "element_references"'
        )
    first = table.pop(0, None)
    charge = first if charge is None else charge
    table = {z: math.nan if value is None else value for z, value in table.items()}
    numbers = {z for z, value in table.items() if type(value) in (int, float) and not math.isinf(value)}
    wrong = [z for z in table if not 1 <= z <= NUM_ELEMENTS or z not in numbers]
    if wrong:
        raise ValueError(
            f"{key}: expected energies (eV) for atomic numbers 1 to {NUM_ELEMENTS} in {path}, got "
            f"{table[wrong[0]]!r} for {wrong[0]}"
        )
    if charge is not None and (type(charge) not in (int, float) or not math.isfinite(charge)):
        raise ValueError(f"{key}: expected an energy (eV) per unit of charge in {path}, got {charge!r}")
    return dense_table(table | {0: charge or 0.0})


@dataclass(frozen=True)
class FittedReferences:
    """Element references of a data set.

    Args:
        table: eV by atomic number, [119]; NaN for elements that do not occur. Entry 0: eV per unit of charge.
        residuals: |E - sum of the references| over the atoms of each structure, eV/atom.
        undetermined: symbols of elements whose energies the data fixes in sums only.
    """

    table: np.ndarray
    residuals: np.ndarray
    undetermined: list[str]


def fit_element_references(
    numbers: Sequence[np.ndarray],
    energies: Sequence[float],
    charges: Sequence[int] = (),
) -> FittedReferences:
    r"""Least squares of total energies on the counts of the elements and on the charge,
    :math:`\min_r \sum_i (E_i - n_i \cdot r - Q_i r_0)^2`.

    Where elements always come in the same ratio, only the energy of their sum is fixed. Of the solutions the one
    nearest to OMol25's references is taken, or nearest to zero where that suits the energies better (formation
    energies, pseudopotentials).

    Args:
        numbers: atomic numbers of each structure.
        energies: total energies, eV.
        charges: of each structure. Where all are the same, or none are given, :math:`r_0` is zero.

    Raises:
        ValueError: no structures, or an energy that is not finite.
    """
    if not len(numbers) or len(numbers) != len(energies):
        raise ValueError(f"energies: expected one for each of at least one structure, got {len(energies)}")
    target = np.asarray(energies, float)
    if not np.isfinite(target).all():
        raise ValueError(f"energies: expected finite ones, got {target[~np.isfinite(target)][0]}")
    counts = np.stack([np.bincount(z, minlength=NUM_ELEMENTS + 1) for z in numbers]).astype(float)
    present = np.flatnonzero(counts.any(axis=0))
    counts = counts[:, present]
    atoms = counts.sum(axis=1)
    # total energies of all-electron calculations are near the sums of OMOL25's
    starts = [np.nan_to_num(read_element_references(BUNDLED["omol25"]))[present], np.zeros(len(present))]
    start = min(starts, key=lambda r: np.abs((target - counts @ r) / atoms).mean())
    charge = np.reshape(charges, (-1, 1)).astype(float) if len(set(charges)) > 1 else np.zeros((len(counts), 1))
    correction = np.linalg.lstsq(np.hstack([counts, charge]), target - counts @ start, rcond=None)[0]
    table = np.full(NUM_ELEMENTS + 1, math.nan)
    table[present], table[0] = start + correction[:-1], correction[-1]
    # An element is undetermined where some change of the table that no energy sees changes it.
    rank = np.linalg.matrix_rank(counts)
    free = np.abs(np.linalg.svd(counts.T @ counts)[2][rank:]).max(axis=0, initial=0.0)
    undetermined = [chemical_symbols[z] for z in present[free > 1e-6]]
    left = target - counts @ table[present] - charge[:, 0] * table[0]
    return FittedReferences(table, np.abs(left) / atoms, undetermined)


def spread(size: int, limit: int) -> np.ndarray:
    """At most `limit` of the indices 0 to size - 1, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, limit)).astype(int))


def read_energies(path: str, limit: int) -> tuple[list[np.ndarray], list[float], list[int]]:
    """Atomic numbers, total energies (eV) and charges of at most `limit` structures of an ASE database, spread over it.

    Structures without a finite energy are left out, and how many is said in the log.
    """
    from fairchem.core.datasets.ase_datasets import AseDBDataset

    dataset = AseDBDataset({"src": path})
    chosen = spread(len(dataset), limit).tolist()
    found = [(atoms, _energy(atoms)) for atoms in map(dataset.get_atoms, chosen)]
    kept = [(atoms, energy) for atoms, energy in found if math.isfinite(energy)]
    if len(kept) < len(chosen):
        logging.warning("%s: %d of %d structures have no finite energy", path, len(chosen) - len(kept), len(chosen))
    charges = [int(atoms.info.get("charge", 0)) for atoms, _ in kept]
    return [atoms.numbers for atoms, _ in kept], [energy for _, energy in kept], charges


def _energy(atoms: Atoms) -> float:
    labels = {} if atoms.calc is None else atoms.calc.results
    return float(atoms.info.get("energy", labels.get("energy", math.nan)))
