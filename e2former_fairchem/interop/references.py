"""Element references of the authors' heads."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ase.data import chemical_symbols

__all__ = ["element_references", "elements_of", "read_element_references", "table_of_head"]

_TABLES = Path(__file__).with_name("molfm_element_references.json")
NUM_ELEMENTS = 118


@functools.cache
def _tables() -> dict[str, dict[int, float]]:
    content = json.loads(_TABLES.read_text())
    return {
        name: {int(z): float(value) for z, value in table["reference_times_unit_eV_by_Z"].items()}
        for name, table in content.items()
    }


def table_of_head(head: str) -> str:
    """Name of the table that belongs to a head: ``omol25``, ``tzvpd``, ``svp``, ``spice`` or ``oc20``.

    Raises ValueError for a head without a known table.
    """
    for name in _tables():
        if head == name or (name in ("svp", "tzvpd", "spice") and head.startswith(name)):
            return name
    raise ValueError(
        f"head: element references are known for {', '.join(_tables())} and for names that begin with svp, tzvpd or "
        f"spice, got {head!r}; give references, a JSON file or 'none'"
    )


def element_references(head: str) -> list[float]:
    """Energies by atomic number, eV, [119] (entry 0 unused): E = network's energy + sum of these over the atoms.

    The spice table is zero. In the others an element that is not there is NaN: the head was never trained on it, and
    its total energy is not defined.
    Raises ValueError for a head without a known table.
    """
    name = table_of_head(head)
    return _dense({} if name == "spice" else _tables()[name], 0.0 if name == "spice" else math.nan)


def read_element_references(location: str | Path) -> list[float]:
    """Energies by atomic number, eV, [119], from a JSON file: an object ``{"1": -13.6, ...}`` or a list by number.

    Elements that an object does not name are NaN. Raises FileNotFoundError and ValueError naming the file.
    """
    path = Path(location)
    if not path.is_file():
        raise FileNotFoundError(f"references: expected a JSON file, got {path}, which does not exist")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as err:
        raise ValueError(f"references: expected JSON in {path}, got {err}") from err
    if isinstance(content, Mapping):
        content = content.get("element_references", content)
    if isinstance(content, Mapping) and all(str(key).isdigit() for key in content):
        table = {int(key): value for key, value in content.items()}
    elif isinstance(content, Sequence) and not isinstance(content, str):
        table = dict(enumerate(content))
    else:
        raise ValueError(f"references: expected in {path} a list by atomic number or an object of numbers by it")
    table.pop(0, None)
    wrong = [z for z, value in table.items() if not 1 <= z <= NUM_ELEMENTS or not isinstance(value, int | float)]
    if wrong:
        raise ValueError(
            f"references: expected energies (eV) for atomic numbers 1 to {NUM_ELEMENTS} in {path}, got "
            f"{table[wrong[0]]!r} for {wrong[0]}"
        )
    return _dense(table, math.nan)


def elements_of(references: Sequence[float]) -> list[str]:
    """Symbols of the elements that have a reference."""
    return [chemical_symbols[z] for z, value in enumerate(references) if z and math.isfinite(value)]


def _dense(table: Mapping[int, float], default: float) -> list[float]:
    return [0.0, *(float(table.get(z, default)) for z in range(1, NUM_ELEMENTS + 1))]
