"""Checks of the results of an evaluation task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.jsonio import decode

from e2former_fairchem.leaderboard.report import Report, listed
from e2former_fairchem.leaderboard.tasks import KeyPath, get_task, load_inputs, read_results

Results = Mapping[KeyPath, dict[str, Any]]
#: Å, between a file's positions and those of the reference: half of the third decimal, to which some programs round.
POSITION_TOLERANCE = 5.5e-4


def atoms_of(result: Mapping[str, Any]) -> Atoms:
    """The structure of a single point or of one end of a relaxation.

    Raises:
        ValueError: no MSONAtoms dictionary.
    """
    packed = result.get("atoms")
    if not isinstance(packed, dict) or "atoms_json" not in packed:
        raise ValueError("atoms: expected an MSONAtoms object with atoms_json")
    try:
        atoms = decode(packed["atoms_json"])
    except Exception as err:  # ASE's decoder meets whatever is in the file
        raise ValueError(f"atoms: expected ase.Atoms in atoms_json, got {type(err).__name__}: {err}") from err
    if not isinstance(atoms, Atoms):
        raise ValueError(f"atoms: expected ase.Atoms in atoms_json, got {type(atoms).__name__}")
    return atoms


def check_point(result: Any) -> Atoms:
    """The structure of one calculation whose energy and forces are as they should be.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(result, dict):
        raise ValueError(f"expected an object, got {type(result).__name__}")
    missing = [k for k in ("atoms", "energy", "forces") if k not in result]
    if missing:
        raise ValueError(f"expected atoms, energy and forces, got none of {', '.join(missing)}")
    atoms, energy = atoms_of(result), result["energy"]
    if not np.isfinite(atoms.positions).all():
        raise ValueError("atoms: expected finite positions")
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not np.isfinite(energy):
        raise ValueError(f"energy: expected a finite number, got {energy!r}")
    try:
        forces = np.asarray(result["forces"], float)
    except (TypeError, ValueError) as err:
        raise ValueError("forces: expected a list of triples of numbers") from err
    if forces.shape != (len(atoms), 3):
        raise ValueError(f"forces: expected {(len(atoms), 3)}, got {forces.shape}")
    if not np.isfinite(forces).all():
        raise ValueError("forces: expected finite numbers")
    return atoms


def check_task(report: Report, file: Path, task: str, reference: Path | None) -> None:
    """Note what holds of a task's result file.

    Checked: gzipped JSON, the task's nesting, energy, forces and structure of each calculation, what the task's metric
    assumes (components that make up the complex, three consecutive charges, names with charge and spin, points of a
    curve). Against the input pickle or another result file: the same keys, elements, and starting positions, up to
    POSITION_TOLERANCE.

    Args:
        report: where it is noted.
        file: the result file.
        task: its name.
        reference: the input pickle or another result file, or None.

    Raises:
        ValueError, FileNotFoundError: the reference cannot be read.
    """
    expected = _reference(task, reference) if reference is not None else None
    try:
        results = read_results(file)
    except ValueError as err:
        report.require(False, "", str(err))
        return
    report.require(True, f"JSON with {len(results)} calculations in {len({p[0] for p in results})} top-level entries")
    with file.open("rb") as handle:
        if handle.read(2) != b"\x1f\x8b":
            report.note("the JSON is not gzipped; the leaderboard takes the gzipped file")

    rules = get_task(task)
    deep = [path for path in results if len(path) not in rules.relaxed]
    report.require(
        not deep,
        f"nested as {task} is",
        f"expected results of {task} at depth {' or '.join(map(str, sorted(rules.relaxed)))}, got others at "
        f"{listed(('/'.join(p) for p in deep), len(deep))}",
    )
    structures: dict[KeyPath, Atoms] = {}
    problems: list[str] = []
    for path, result in results.items():
        try:
            if rules.relaxed.get(len(path), False):
                missing = [k for k in ("initial", "final") if k not in result]
                if missing:
                    raise ValueError(f"expected a relaxation (initial, final), got none of {', '.join(missing)}")
                structures[path] = check_point(result["initial"])
                final = check_point(result["final"])
                if final.numbers.tolist() != structures[path].numbers.tolist():
                    raise ValueError("final: expected the elements of initial in the same order")
            else:
                structures[path] = check_point(result)
        except ValueError as err:
            problems.append(f"{'/'.join(path)}: {err}")
    report.require(
        not problems,
        "atoms, a finite energy and finite forces in every calculation",
        f"calculations with problems: {listed(problems, len(problems))}",
    )
    if rules.check is not None and not deep:
        text, wrong = rules.check(structures)
        report.require(not wrong, text, f"expected {text}; not so: {listed(wrong, len(wrong))}")
    if expected is not None:
        _compare(report, structures, results.keys(), expected)


def _reference(task: str, reference: Path) -> dict[KeyPath, Atoms]:
    if reference.name.endswith((".pkl", ".pickle")):
        return {unit.path: unit.atoms for unit in load_inputs(task, reference, "--reference")}
    found = {}
    for path, result in read_results(reference, "--reference").items():
        try:
            found[path] = atoms_of(result.get("initial", result))
        except ValueError as err:
            raise ValueError(f"--reference: {reference}, {'/'.join(path)}: {err}") from err
    return found


def _compare(report: Report, structures: Mapping[KeyPath, Atoms], keys: Any, expected: Mapping[KeyPath, Atoms]) -> None:
    if not report.require_matches("calculations", ["/".join(p) for p in keys], ["/".join(p) for p in expected]):
        return
    moved, compared = [], 0
    for path, atoms in structures.items():
        other = expected.get(path)
        if other is None:
            continue
        compared += 1
        if atoms.numbers.tolist() != other.numbers.tolist():
            moved.append(f"{'/'.join(path)}: other elements or another order")
        elif not (off := np.abs(atoms.positions - other.positions).max(initial=0.0)) <= POSITION_TOLERANCE:
            moved.append(f"{'/'.join(path)}: positions up to {off:.2g} Å off")
    report.require(
        not moved,
        f"elements and starting positions (within {POSITION_TOLERANCE:g} Å) as in the reference, of {compared} "
        "calculations",
        f"expected elements and starting positions of the reference, got others in {listed(moved, len(moved))}",
    )
