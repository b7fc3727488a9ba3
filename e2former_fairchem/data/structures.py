"""Checks of one ASE structure before fairchem converts it: what it would turn into another number without a word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from ase import Atoms

#: A charge or spin this close to an integer was one before it was written as a float.
INTEGER_TOLERANCE = 1e-3


def whole_number(info: Mapping[str, Any], key: str) -> int:
    """The integer under a key of `atoms.info`; fairchem reads none as 0 and cuts the fraction of -0.9999999 off.

    Raises:
        ValueError: no such key, not a number, or further than `INTEGER_TOLERANCE` from an integer.
    """
    if key not in info:
        raise ValueError(
            f"{key}: expected an integer in the structure's info, got none; an ASE database keeps it in a row's data, "
            "db.write(atoms, data=atoms.info)"
        )
    value = info[key]
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{key}: expected an integer, got {value!r}")
    if abs(value - round(value)) > INTEGER_TOLERANCE:
        raise ValueError(f"{key}: expected an integer (to {INTEGER_TOLERANCE:g}), got {value!r}")
    return round(value)


def check_cell(atoms: Atoms) -> None:
    """Refuse a periodic direction without a lattice vector of its own: fairchem would put one of 1 Å there.

    Something that has no cell at all, like the stub of fairchem's batch server, passes.

    Raises:
        ValueError: there is one.
    """
    pbc = np.asarray(getattr(atoms, "pbc", False))
    if not pbc.any():
        return
    cell = np.asarray(atoms.cell)
    missing = [name for name, periodic, vector in zip("abc", pbc, cell, strict=True) if periodic and not vector.any()]
    if missing:
        raise ValueError(
            f"cell: expected a lattice vector along every periodic direction (pbc = {pbc.tolist()}), got none along "
            f"{', '.join(missing)}; give the vector, or set pbc to false there"
        )
    if np.linalg.matrix_rank(cell[pbc]) < pbc.sum():
        raise ValueError(
            f"cell: expected linearly independent lattice vectors along the periodic directions, got {cell.tolist()}"
        )


def check_structure(atoms: Atoms) -> None:
    """Refuse a structure without atoms, with coordinates that are not finite, or with a cell that `check_cell` refuses.

    Raises:
        ValueError: it is one of these.
    """
    if len(atoms) == 0:
        raise ValueError("atoms: expected at least one, got none")
    wrong = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"positions: expected finite coordinates, got {atoms.positions[wrong[0]].tolist()} for atom {wrong[0]} "
            f"({len(wrong)} such atoms)"
        )
    if not np.isfinite(np.asarray(atoms.cell)).all():
        raise ValueError(f"cell: expected finite lattice vectors, got {np.asarray(atoms.cell).tolist()}")
    check_cell(atoms)
