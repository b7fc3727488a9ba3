"""Element references of the authors' heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ase.data import chemical_symbols

from e2former_fairchem.data.references import BUNDLED, read_element_references

HEADS = tuple(name for name in BUNDLED if name != "sample")


def table_of_head(head: str) -> str:
    """Name of the table that belongs to a head.

    Args:
        head: one of `HEADS`, or a name that begins with ``svp``, ``tzvpd`` or ``spice``.

    Raises:
        ValueError: no table is known for it.
    """
    for name in HEADS:
        if head == name or (name != "omol25" and head.startswith(name)):
            return name
    raise ValueError(
        f"head: element references are known for {', '.join(HEADS)} and for names that begin with svp, tzvpd or "
        f"spice, got {head!r}; give references, a JSON file or 'none'"
    )


def element_references(head: str) -> list[float]:
    """What to add to a network's energy for each atom.

    Args:
        head: see `table_of_head`.

    Returns:
        Energies by atomic number, eV, [119] (entry 0 unused). The spice table is zero. In the others an element that is
        not there is NaN: the head was never trained on it, and its total energy is not defined.

    Raises:
        ValueError: no table is known for the head.
    """
    return read_element_references(BUNDLED[table_of_head(head)])


def elements_of(references: Sequence[float]) -> list[str]:
    """Symbols of the elements that have a reference.

    Args:
        references: by atomic number, eV, [119].
    """
    return [chemical_symbols[z] for z, value in enumerate(references) if z and math.isfinite(value)]
