"""The report's numbers as tables: plain values for JSON, and rows of text for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from e2former_fairchem.report.errors import (
    ELEMENT_SUMS,
    ENERGY_SUMS,
    FORCE_SUMS,
    GROUP_SUMS,
    STRESS_SUMS,
    WORST_NUMBERS,
    SetErrors,
)
from e2former_fairchem.report.groups import binned, has_energy, has_forces, size_bins
from e2former_fairchem.report.sample import quantile
from e2former_fairchem.report.text import short_names, wordy


@dataclass
class Table:
    """A table of text.

    Args:
        header: of the columns; none for no header.
        rows: of cells.
        left: so many first columns are words, the others numbers.
        groups: headings above columns, and how many columns each is above.
    """

    header: list[str]
    rows: list[list[str]]
    left: int = 1
    groups: list[tuple[str, int]] = field(default_factory=list)


def overall(errors: SetErrors) -> dict[str, float | int | None]:
    """Errors on a set in meV, meV/atom, meV/Å and meV/Å^3 (by component), None for what was not compared."""
    energy = dict(zip(ENERGY_SUMS, errors.energy, strict=True))
    forces = dict(zip(FORCE_SUMS, errors.forces, strict=True))
    result: dict[str, Any] = {
        "structures": errors.structures,
        "atoms": errors.atoms,
        "structures_without_finite_prediction": errors.nonfinite,
    }
    n = energy["count"]
    result |= {
        "energy_mae_per_atom": 1000 * energy["abs"] / n if n else None,
        "energy_rmse_per_atom": 1000 * float(np.sqrt(energy["square"] / n)) if n else None,
        "energy_bias_per_atom": 1000 * energy["signed"] / n if n else None,
        "energy_95_percent_per_atom": 1000 * quantile(errors.energy_histogram, 0.95) if n else None,
        "energy_mae": 1000 * energy["abs_total"] / n if n else None,
    }
    n = forces["count"]
    result |= {
        "force_mae": 1000 * forces["abs"] / n if n else None,
        "force_rmse": 1000 * float(np.sqrt(forces["square"] / n)) if n else None,
        "force_95_percent": 1000 * quantile(errors.force_histogram, 0.95) if n else None,
        "force_cosine": forces["cosine"] / forces["atoms"] if n else None,
        "zero_force_mae": 1000 * forces["reference_abs"] / n if n else None,
        "share_of_zero_forces": forces["abs"] / forces["reference_abs"] if forces["reference_abs"] else None,
    }
    stress = dict(zip(STRESS_SUMS, errors.stress, strict=True))
    n = stress["count"]
    result |= {
        "stress_mae": 1000 * stress["abs"] / n if n else None,
        "stress_rmse": 1000 * float(np.sqrt(stress["square"] / n)) if n else None,
    }
    return {key: value if value is None or isinstance(value, int) else float(value) for key, value in result.items()}


def _text(value: float | None, factor: float = 1.0, suffix: str = "") -> str:
    return "–" if value is None or value != value else f"{wordy(factor * value)}{suffix}".replace("-", "−")


def overall_table(sets: Sequence[SetErrors]) -> Table:
    """One row for each set."""
    header = ["set", "structures", "atoms"]
    values = [overall(errors) for errors in sets]
    columns = []
    if any(v["energy_mae_per_atom"] is not None for v in values):
        header += ["E MAE<br>meV/atom", "E RMSE<br>meV/atom", "E bias<br>meV/atom", "E total MAE<br>meV"]
        columns += ["energy_mae_per_atom", "energy_rmse_per_atom", "energy_bias_per_atom", "energy_mae"]
    if any(v["force_mae"] is not None for v in values):
        header += ["F MAE<br>meV/Å", "F RMSE<br>meV/Å", "F MAE / zero<br>forces", "F cosine"]
        columns += ["force_mae", "force_rmse", "share_of_zero_forces", "force_cosine"]
    if any(v["stress_mae"] is not None for v in values):
        header += ["stress MAE<br>meV/Å³", "stress RMSE<br>meV/Å³"]
        columns += ["stress_mae", "stress_rmse"]
    rows = []
    for name, value in zip(short_names([s.name for s in sets]), values, strict=True):
        row = [name, f"{value['structures']:,}", f"{value['atoms']:,}"]
        for column in columns:
            if column == "share_of_zero_forces":
                row.append(_text(value[column], 100, " %"))
            elif column == "force_cosine":
                row.append("–" if value[column] is None else f"{value[column]:.4f}".replace("-", "−"))
            else:
                row.append(_text(value[column]))
        rows.append(row)
    return Table(header, rows)


def element_table(sets: Sequence[SetErrors]) -> Table:
    """Force errors of each element in each set."""
    columns = ["atoms", "F MAE<br>meV/Å", "F RMSE<br>meV/Å", "F MAE / zero<br>forces"]
    rows = []
    for z in np.flatnonzero(sum(s.elements[:, 0] for s in sets)):
        row = [chemical_symbols[z]]
        for errors in sets:
            sums = dict(zip(ELEMENT_SUMS, errors.elements[z], strict=True))
            n = sums["count"]
            row += [
                f"{int(sums['atoms']):,}",
                _text(1000 * sums["abs"] / n if n else None),
                _text(1000 * np.sqrt(sums["square"] / n) if n else None),
                _text(100 * sums["abs"] / sums["reference_abs"] if sums["reference_abs"] else None, suffix=" %"),
            ]
        rows.append(row)
    return Table(["element", *columns * len(sets)], rows, groups=_headings(1, sets, len(columns)))


def _headings(before: int, sets: Sequence[SetErrors], columns: int) -> list[tuple[str, int]]:
    return [("", before), *((name, columns) for name in short_names([s.name for s in sets]))]


def _group_table(label: list[str], keys: Sequence[Any], sets: Sequence[SetErrors], rows_of: Any) -> Table:
    columns = ["structures", "E MAE<br>meV/atom", "F MAE<br>meV/Å", "F MAE / zero<br>forces"]
    rows = []
    for key in keys:
        row = [str(part).replace("-", "−") if isinstance(part, int) else part for part in key]
        for errors in sets:
            found: NDArray | None = rows_of(errors, key)
            sums = dict(zip(GROUP_SUMS, np.zeros(len(GROUP_SUMS)) if found is None else found, strict=True))
            energies, forces, zero = sums["energy_count"], sums["force_count"], sums["force_reference_abs"]
            row += [
                f"{int(sums['structures']):,}",
                _text(1000 * sums["energy_abs"] / energies if energies else None),
                _text(1000 * sums["force_abs"] / forces if forces else None),
                _text(100 * sums["force_abs"] / zero if zero else None, suffix=" %"),
            ]
        rows.append(row)
    header = [*label, *columns * len(sets)]
    return Table(header, rows, left=0, groups=_headings(len(label), sets, len(columns)))


def state_table(sets: Sequence[SetErrors]) -> Table:
    """Errors for each pair of charge and multiplicity."""
    keys = sorted({key for s in sets for key in s.states})
    return _group_table(["charge", "2S+1"], keys, sets, lambda errors, key: errors.states.get(key))


def size_table(sets: Sequence[SetErrors]) -> Table:
    """Errors by the number of atoms."""
    bins = size_bins(sets)
    tables = {id(errors): dict(zip(bins, binned(errors, bins), strict=True)) for errors in sets}
    keys = [(str(a) if a == b else f"{a} to {b}",) for a, b in bins]
    by_key = dict(zip(keys, bins, strict=True))
    return _group_table(["atoms"], keys, sets, lambda errors, key: tables[id(errors)][by_key[key]])


def worst_table(errors: SetErrors, energy: bool, names: Mapping[str, str]) -> Table:
    """The structures with the largest error of the energy per atom, or of the forces."""
    numbers, formulas = errors.worst_energy if energy else errors.worst_forces
    rows = []
    for row, formula in zip(numbers, formulas, strict=True):
        value = dict(zip(WORST_NUMBERS, row, strict=True))
        spin = int(value["spin"])
        rows.append(
            [
                names.get(str(int(value["index"])), "–"),
                str(formula),
                f"{int(value['atoms']):,}",
                f"{int(value['charge'])}".replace("-", "−"),
                str(spin) if spin else "–",
                _signed(1000 * value["energy_error"]) if has_energy(errors) else "–",
                _text(1000 * value["force_mae"]) if has_forces(errors) else "–",
                _text(1000 * value["force_max"]) if has_forces(errors) else "–",
            ]
        )
    header = ["structure", "formula", "atoms", "charge", "2S+1"]
    header += ["E error<br>meV/atom", "F MAE<br>meV/Å", "largest |ΔF|<br>meV/Å"]
    return Table(header, rows, left=2)


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{wordy(abs(value))}"


def summary(sets: Sequence[SetErrors]) -> dict[str, Any]:
    """Everything above as numbers, for JSON: errors on each set, by element, by charge and spin, and by size."""

    def groups(table: Mapping[tuple[int, ...], NDArray], names: Sequence[str]) -> list[dict[str, Any]]:
        found = []
        for key in sorted(table):
            sums = dict(zip(GROUP_SUMS, table[key], strict=True))
            found.append(
                dict(zip(names, key, strict=True))
                | {
                    "structures": int(sums["structures"]),
                    "energy_mae_per_atom": _ratio(sums["energy_abs"], sums["energy_count"]),
                    "force_mae": _ratio(sums["force_abs"], sums["force_count"]),
                }
            )
        return found

    result = {}
    for errors in sets:
        elements = {}
        for z in np.flatnonzero(errors.elements[:, 0]):
            sums = dict(zip(ELEMENT_SUMS, errors.elements[z], strict=True))
            elements[chemical_symbols[z]] = {
                "atoms": int(sums["atoms"]),
                "force_mae": _ratio(sums["abs"], sums["count"]),
                "zero_force_mae": _ratio(sums["reference_abs"], sums["count"]),
            }
        result[errors.name] = overall(errors) | {
            "by_element": elements,
            "by_charge_and_spin": groups(errors.states, ("charge", "spin")),
            "by_number_of_atoms": groups(errors.sizes, ("atoms",)),
        }
    return result


def _ratio(total: float, count: float) -> float | None:
    return 1000 * float(total / count) if count else None
