"""Element references of the authors' heads."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ase.data import chemical_symbols

from e2former_fairchem.data.references import NUM_ELEMENTS, dense_table, read_element_references

__all__ = ["NUM_ELEMENTS", "element_references", "elements_of", "read_element_references", "table_of_head"]

_TABLES = Path(__file__).with_name("molfm_element_references.json")


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
    return dense_table({} if name == "spice" else _tables()[name], 0.0 if name == "spice" else math.nan)


def elements_of(references: Sequence[float]) -> list[str]:
    """Symbols of the elements that have a reference."""
    return [chemical_symbols[z] for z, value in enumerate(references) if z and math.isfinite(value)]
