"""Checks of an S2EF file."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import numpy as np

from e2former_fairchem.leaderboard.report import Report, listed

#: Structures in OMol25's parts, as the leaderboard's documentation gives them.
OMOL25 = {2_762_021: "validation", 2_805_046: "test"}
FIELDS = {"ids": "str (N,)", "energy": "float64 (N,)", "forces": "float64 (sum natoms, 3)", "natoms": "int64 (N,)"}


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; those that only a pickle could hold are left out.

    Raises:
        ValueError: no whole .npz file.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = {}
            for name in archive.files:
                try:
                    found[name] = archive[name]
                except ValueError as err:
                    if "allow_pickle" not in str(err):
                        raise
            return found
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, AttributeError, TypeError) as err:
        raise ValueError(f"{file}: expected a whole .npz file, got {type(err).__name__}: {err}") from err


def reference_structures(reference: Path) -> dict[str, int]:
    """Ids and their numbers of atoms: of a data set, or of another S2EF file.

    Raises:
        ValueError, FileNotFoundError: neither, or with a repeated id.
    """
    if reference.is_file() and reference.suffix == ".npz":
        arrays = _read(reference)
        if not {"ids", "natoms"} <= arrays.keys():
            raise ValueError(f"--reference: expected the arrays ids and natoms in {reference}, got {', '.join(arrays)}")
        pairs = list(zip(arrays["ids"].tolist(), arrays["natoms"].tolist(), strict=True))
    else:
        from fairchem.core.datasets.ase_datasets import AseDBDataset

        from e2former_fairchem.data.checks import check_dataset

        dataset = AseDBDataset({"src": check_dataset("--reference", str(reference))})
        logging.info("reading the ids of %d structures of %s", len(dataset), reference)
        pairs = []
        for index in range(len(dataset)):
            atoms = dataset.get_atoms(index)
            if "source" not in atoms.info:
                raise ValueError(f"--reference: expected atoms.info['source'] in {reference}, row {index} has none")
            pairs.append((str(atoms.info["source"]), len(atoms)))
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"--reference: expected each id once in {reference}, got {len(pairs) - len(found)} repeated")
    return found


def check_s2ef(report: Report, file: Path, reference: Path | None) -> None:
    """Note what holds of an S2EF file.

    Checked: the four arrays with their types and shapes, each id once, forces for every atom, finite numbers; against
    a reference also that the ids are the same and every structure has its number of atoms.

    Raises:
        ValueError, FileNotFoundError: the reference cannot be read.
    """
    expected = reference_structures(reference) if reference is not None else None
    try:
        arrays = _read(file)
    except ValueError as err:
        report.require(False, "", str(err))
        return
    missing = [name for name in FIELDS if name not in arrays]
    more = sorted(set(arrays) - set(FIELDS))
    if not report.require(
        not missing,
        "the arrays ids, energy, forces and natoms",
        f"expected the arrays {', '.join(FIELDS)} without pickled objects, got none called {', '.join(missing)}",
    ):
        return
    if more:
        report.note(f"arrays that the leaderboard does not ask for: {', '.join(more)}")
    ids, energy, forces, natoms = (arrays[name] for name in FIELDS)

    number = len(ids) if ids.ndim == 1 else -1
    wanted = {"ids": ("U", (number,)), "energy": ("f8", (number,)), "natoms": ("i8", (number,))}
    shaped = True
    for name, (kind, shape) in wanted.items():
        array = arrays[name]
        right = array.dtype.str.lstrip("<>|=")
        matches = (right.startswith("U") if kind == "U" else right == kind) and array.shape == shape
        shaped &= report.require(
            matches,
            f"{name}: {FIELDS[name]}, N = {number}",
            f"{name}: expected {FIELDS[name]} with N = {max(number, 0)}, got {array.dtype} {array.shape}",
        )
    shaped &= report.require(
        forces.dtype == np.float64 and forces.ndim == 2 and forces.shape[1] == 3,
        f"forces: float64 {forces.shape}",
        f"forces: expected float64 (sum natoms, 3), got {forces.dtype} {forces.shape}",
    )
    if not shaped:
        return
    report.require(number > 0, f"{number} structures", "expected at least one structure, got none")
    if number in OMOL25:
        report.note(f"as many structures as OMol25's {OMOL25[number]} set")
    else:
        parts = " or ".join(f"{n} ({part})" for n, part in OMOL25.items())
        report.note(f"OMol25 has {parts} structures, this file has {number}")
    unique, counts = np.unique(ids, return_counts=True)
    twice = unique[counts > 1]
    report.require(
        not len(twice), "each id once", f"ids: expected each id once, got repeated {listed(twice, len(twice))}"
    )
    empty = int(np.count_nonzero(np.char.strip(ids) == ""))
    report.require(not empty, "no empty id", f"ids: expected names, got {empty} empty")
    small = np.flatnonzero(natoms < 1)
    report.require(not len(small), "natoms positive", f"natoms: expected at least 1, got less for {_some(ids, small)}")
    total = int(natoms.sum())
    consistent = not len(small) and report.require(
        total == len(forces),
        f"{total} atoms, as many as rows of forces",
        f"forces: expected {total} rows (the sum of natoms), got {len(forces)}",
    )
    bad = np.flatnonzero(~np.isfinite(energy))
    report.require(
        not len(bad), "finite energies", f"energy: expected finite numbers, got others for {_some(ids, bad)}"
    )
    rows = np.flatnonzero(~np.isfinite(forces).all(axis=1))
    owners = np.unique(np.searchsorted(np.cumsum(natoms), rows, side="right")) if consistent else rows[:0]
    report.require(
        not len(rows),
        "finite forces",
        f"forces: expected finite numbers, got others in {len(rows)} rows, of {_some(ids, owners)}",
    )
    if expected is not None:
        _compare(report, dict(zip(ids.tolist(), natoms.tolist(), strict=True)), expected)


def _some(ids: np.ndarray, where: np.ndarray) -> str:
    return listed(ids[where[:3]], len(where))


def _compare(report: Report, given: dict[str, int], expected: dict[str, int]) -> None:
    if not report.require_matches("ids", given, expected):
        return
    differing = [f"{i}: expected {n}, got {given[i]}" for i, n in expected.items() if given.get(i, n) != n]
    report.require(
        not differing,
        f"numbers of atoms as in the reference, of the {len(given.keys() & expected.keys())} structures of both",
        f"natoms: other numbers than in the reference for {listed(differing, len(differing))}",
    )
