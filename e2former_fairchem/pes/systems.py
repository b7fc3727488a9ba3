"""Structures by name: ASE's molecules, some of our own, and those of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from ase.io import read

from e2former_fairchem.data.structures import whole_number
from e2former_fairchem.validation import CHARGE_RANGE, SPIN_RANGE, read_other_spellings


def _water_dimer() -> Atoms:
    """A hydrogen bond along z, O to O 2.91 Å, near the minimum of the pair."""
    donor = Atoms("OHH", [[0, 0, 0], [0, 0, 0.965], [0.932, 0, -0.243]])
    half, length = np.deg2rad(52.3), 0.96
    tilt = np.deg2rad(55)
    hydrogens = [
        [length * np.cos(half) * -np.sin(tilt), side * length * np.sin(half), length * np.cos(half) * np.cos(tilt)]
        for side in (1, -1)
    ]
    acceptor = Atoms("OHH", np.array([[0, 0, 0], *hydrogens]) + [0, 0, 2.91])
    return donor + acceptor


def _chiral_methane() -> Atoms:
    """CHFClBr, the smallest chiral molecule of the textbooks, with tetrahedral angles."""
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    lengths = np.array([1.09, 1.36, 1.76, 1.93])  # C-H, C-F, C-Cl, C-Br, Å
    return Atoms("CHFClBr", np.vstack([np.zeros(3), lengths[:, None] * corners]))


def _methyloxirane() -> Atoms:
    """Propylene oxide, 10 atoms: oxirane with a methyl group, staggered, in place of a hydrogen. Chiral."""
    ring = molecule("CH2OCH2")
    (oxygen,), carbon = np.flatnonzero(ring.numbers == 8), np.flatnonzero(ring.numbers == 6)[0]
    hydrogen = min(np.flatnonzero(ring.numbers == 1), key=lambda atom: ring.get_distance(carbon, atom))
    axis = ring.get_distance(carbon, hydrogen, vector=True)
    axis /= np.linalg.norm(axis)
    side = ring.get_distance(oxygen, carbon, vector=True)
    side -= (side @ axis) * axis
    side /= np.linalg.norm(side)
    methyl = ring.positions[carbon] + 1.50 * axis
    turns = 2 * np.pi * np.arange(3)[:, None] / 3
    around = np.cos(turns) * side + np.sin(turns) * np.cross(axis, side)
    del ring[hydrogen]
    return ring + Atoms("CH3", np.vstack([methyl, methyl + 1.09 * (axis + np.sqrt(8) * around) / 3]))


def _ammonia_crystal() -> Atoms:
    """Two ammonia molecules in a cell smaller than the cutoff, 8 atoms, about 70 neighbours within 6 Å."""
    one, other = molecule("NH3"), molecule("NH3")
    other.rotate(180, "x")
    other.translate([2.3, 2.4, 0.5])
    both = one + other
    both.set_cell([4.6, 4.8, 4.2])
    both.pbc = True
    both.set_initial_magnetic_moments(None)
    return both


def _diamond() -> Atoms:
    """The primitive cell of diamond, 2 atoms."""
    return bulk("C", "diamond", a=3.57)


OWN: dict[str, Callable[[], Atoms]] = {
    "water_dimer": _water_dimer,
    "CHFClBr": _chiral_methane,
    "methyloxirane": _methyloxirane,
    "ammonia_crystal": _ammonia_crystal,
    "diamond": _diamond,
}


def _set_charge_and_spin(info: dict[str, Any], where: str) -> None:
    """Set charge and spin of a structure, as integers in range.

    Args:
        info: of the structure.
        where: its place, for messages.
    """
    try:
        read_other_spellings(info)
        for key, (low, high), default in (("charge", CHARGE_RANGE, 0), ("spin", SPIN_RANGE, 1)):
            info[key] = whole_number({key: default} | info, key)
            if not low <= info[key] <= high:
                raise ValueError(f"{key}: expected {low} to {high}, got {info[key]}")
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err


def _from_file(spec: str, key: str) -> list[tuple[str, Atoms]]:
    path, _, index = spec.partition("@")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{key}: expected a molecule of ASE's g2 collection, one of {', '.join(OWN)}, or a file that ASE reads, "
            f"got {spec!r}, and there is no file {file.absolute()}"
        )
    try:
        found = read(file, index or ":")
    except Exception as err:  # ASE's readers raise anything
        raise ValueError(
            f"{key}: expected a file of structures that ASE reads, got {spec}: {type(err).__name__}: {err}"
        ) from err
    found = found if isinstance(found, list) else [found]
    if not found or any(len(atoms) == 0 for atoms in found):
        raise ValueError(f"{key}: expected structures with at least one atom, got an empty one or none in {spec}")
    for n, atoms in enumerate(found):
        _set_charge_and_spin(atoms.info, f"{key}: structure {n} of {spec}")
    if len(found) == 1:
        return [(file.stem, found[0])]
    return [(f"{file.stem}[{n}]", atoms) for n, atoms in enumerate(found)]


def load_systems(
    specs: Sequence[str], key: str, min_atoms: int = 2, constraints: bool = False
) -> list[tuple[str, Atoms]]:
    """Structures with names.

    Charge and spin (the multiplicity) come from a structure's info, also spelled total_charge and multiplicity or
    spin_multiplicity. Without them the charge is 0, and the multiplicity is 1, or what ASE's magnetic moments of a g2
    molecule say (O2: 3).

    Args:
        specs: molecules of ASE's g2 collection (`CH3OH`), our own (`OWN`), or files that ASE reads, each structure of
            them or some (`FILE@0:3`).
        key: config key, for messages.
        min_atoms: least number of atoms of a structure.
        constraints: leave those of the structures.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: a file that ASE cannot read, or without structures; a structure with fewer atoms than `min_atoms`,
            or whose charge or spin is no integer in fairchem's range, or given twice with different values.
    """
    found: list[tuple[str, Atoms]] = []
    for spec in specs:
        if spec in OWN:
            loaded = [(spec, OWN[spec]())]
        elif spec in g2.names:
            atoms = molecule(spec)
            unpaired = round(float(np.sum(atoms.get_initial_magnetic_moments())))
            atoms.info["spin"] = 1 + abs(unpaired)
            loaded = [(spec, atoms)]
        else:
            loaded = _from_file(spec, key)
        for name, atoms in loaded:
            if len(atoms) < min_atoms:
                raise ValueError(
                    f"{key}: expected structures with {min_atoms} atoms or more, got {len(atoms)} in {name}"
                )
            atoms.info.setdefault("charge", 0)
            atoms.info.setdefault("spin", 1)
            atoms.calc = None
            if not constraints:
                atoms.set_constraint()
        found += loaded
    names = [name for name, _ in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{key}: expected each system once, got {', '.join(repeated)} more than once")
    return found
