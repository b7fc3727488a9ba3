"""Structures with labels from any files that ASE reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import ground_state_magnetic_moments
from ase.db import connect
from ase.io import iread
from ase.stress import voigt_6_to_full_3x3_stress

from e2former_fairchem.data.checks import DATABASE_SUFFIXES
from e2former_fairchem.data.structures import whole_number
from e2former_fairchem.validation import CHARGE_RANGE, SPIN_RANGE

#: Spellings of a label are a prefix and a name, in any case.
PREFIXES = ("", "ref_", "dft_")
LABELS: Mapping[str, tuple[str, ...]] = {"energy": ("energy",), "forces": ("forces", "force"), "stress": ("stress",)}
CHARGE = ("charge", "total_charge")
SPIN = ("spin", "multiplicity", "spin_multiplicity")
#: Labels that two keys give may differ so much (relative, and eV or eV/Å) and be the same.
SAME = 1e-6


@dataclass(frozen=True)
class Keys:
    """Names of labels, charge and spin in a structure's info, arrays or results; None looks for the usual ones."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    charge: str | None = None
    spin: str | None = None


@dataclass
class Frame:
    """One structure of a file, with what was found beside it.

    atoms: elements, positions (Å), cell and pbc; charge and spin (multiplicity) in its info. file, number: where it
    came from, from 0 as ASE counts. info: the structure's whole info. energy: eV. forces: eV/Å, [N, 3]. stress: eV/Å^3,
    [3, 3]; of periodic structures only. found: the key of each label. assumed: charge and spin that were not given.
    problems: what forbids its use, each a kind and a detail.
    """

    atoms: Atoms
    file: str
    number: int
    info: dict[str, Any]
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    found: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_isolated_atom(self) -> bool:
        """A single atom in open space."""
        return len(self.atoms) == 1 and not self.atoms.pbc.any()


def read_frames(files: Sequence[str | Path], keys: Keys | None = None) -> list[Frame]:
    """All structures of some files, or of folders of `.aselmdb` files, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that ASE cannot read, without structures or given twice; labels under several keys that
            differ; a key that no structure has.
    """
    keys = keys or Keys()
    paths = [path for name in files for path in _files(name)]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise ValueError(f"files: expected each once, got {', '.join(repeated)} more than once")
    frames = []
    for path in paths:
        before = len(frames)
        frames += (_frame(atoms, path, number, keys) for number, atoms in enumerate(_structures(path)))
        if len(frames) == before:
            raise ValueError(f"{path}: expected at least one structure, got none")
    for label, key in vars(keys).items():
        if key is not None and not any(label in frame.found for frame in frames):
            there = sorted({name for frame in frames[:100] for name in _everything(frame)})
            raise ValueError(f"--{label}-key: expected a key of the structures, got {key!r}; there are: {there}")
    return frames


def _files(name: str | Path) -> list[Path]:
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        found = sorted(path.glob("*.aselmdb"))
        if not found:
            raise FileNotFoundError(f"{path}: expected a file that ASE reads, or a folder with .aselmdb files")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return [path]


def _structures(path: Path) -> Iterator[Atoms]:
    number = 0
    try:
        if path.suffix in DATABASE_SUFFIXES:
            with connect(str(path), **({"readonly": True} if path.suffix == ".aselmdb" else {})) as database:
                for row in database.select():
                    atoms = row.toatoms()
                    atoms.info.update(row.key_value_pairs, **(row.data or {}))
                    yield atoms
                    number += 1
        else:
            for atoms in iread(str(path), index=":"):
                yield atoms
                number += 1
    except Exception as err:  # ASE's readers raise anything
        raise ValueError(
            f"{path}: expected a file that ASE reads, got something else at structure {number} "
            f"({type(err).__name__}: {err})"
        ) from err


def _everything(source: Frame | Atoms) -> dict[str, Any]:
    """Whatever a structure carries by name."""
    if isinstance(source, Frame):
        return source.info
    results = {} if source.calc is None else getattr(source.calc, "results", {})
    return {**source.info, **source.arrays, **results}


def _frame(raw: Atoms, path: Path, number: int, keys: Keys) -> Frame:
    atoms = Atoms(numbers=raw.numbers, positions=raw.positions, cell=raw.cell, pbc=raw.pbc)
    everything = _everything(raw)
    frame = Frame(atoms, str(path), number, everything)
    shapes = {"energy": ((), (1,)), "forces": ((len(atoms), 3),), "stress": ((6,), (9,), (3, 3))}
    for label, names in LABELS.items():
        if label == "stress" and not atoms.pbc.any():
            continue  # no volume
        name, value = _label(frame, everything, label, names, getattr(keys, label))
        if name is None:
            continue
        frame.found[label] = name
        if value.shape not in shapes[label]:
            frame.problems.append((f"{label} of a wrong shape", f"{name}: {list(value.shape)}"))
        elif label == "energy":
            frame.energy = float(value.reshape(()))
        elif label == "forces":
            frame.forces = value
        else:
            frame.stress = voigt_6_to_full_3x3_stress(value) if value.shape == (6,) else value.reshape(3, 3)
    if frame.forces is None and frame.is_isolated_atom:
        frame.forces = np.zeros((1, 3))
    _charge_and_spin(frame, everything, keys)
    return frame


def _label(
    frame: Frame, everything: Mapping[str, Any], label: str, names: Sequence[str], key: str | None
) -> tuple[str | None, np.ndarray]:
    """Key and value of a label, or None."""
    allowed = {prefix + name for prefix in PREFIXES for name in names}
    found: dict[str, np.ndarray] = {}
    for name, value in everything.items():
        if name == key or (key is None and name.lower() in allowed):
            try:
                found[name] = np.asarray(value, dtype=float)
            except (TypeError, ValueError):
                frame.problems.append((f"{label} that is no number", f"{name}={value!r}"))
    if not found:
        return None, np.empty(0)
    (first, value), *others = found.items()
    for name, other in others:
        if other.shape != value.shape or not np.allclose(other, value, SAME, SAME, equal_nan=True):
            raise ValueError(
                f"{frame.file}: frame {frame.number} has {label} under {first} and, different, under {name}; say which "
                f"one with --{label}-key"
            )
    return first, value


def _charge_and_spin(frame: Frame, everything: Mapping[str, Any], keys: Keys) -> None:
    """Set both in the structure's info, from the given ones or as the number of electrons allows."""
    info = frame.atoms.info
    charge = _integer(frame, everything, "charge", (keys.charge,) if keys.charge else CHARGE, CHARGE_RANGE)
    info["charge"] = 0 if charge is None else charge
    electrons = int(frame.atoms.numbers.sum()) - info["charge"]
    periodic = bool(frame.atoms.pbc.any())
    # The number of electrons of a cell says nothing about a crystal: a supercell would be another system.
    lowest = 1 if periodic else 1 + electrons % 2
    if frame.is_isolated_atom and info["charge"] == 0:  # whose energy a file has is that of its ground state
        moment = round(float(ground_state_magnetic_moments[frame.atoms.numbers[0]]))
        lowest = 1 + moment if (electrons - moment) % 2 == 0 else lowest
    spin = _integer(frame, everything, "spin", (keys.spin,) if keys.spin else SPIN, SPIN_RANGE) or None  # 0: not known
    info["spin"] = lowest if spin is None else spin
    frame.assumed |= {"charge": 0} if charge is None else {}
    frame.assumed |= {"spin": lowest} if spin is None else {}
    if not periodic and (electrons - info["spin"]) % 2 == 0:
        said = f"charge {info['charge']}, multiplicity {info['spin']}, {electrons} electrons"
        frame.problems.append(("a multiplicity that the number of electrons does not allow", said))


def _integer(
    frame: Frame, everything: Mapping[str, Any], what: str, names: Sequence[str], bounds: tuple[int, int]
) -> int | None:
    given = {}
    for name in names:
        if name not in everything:
            continue
        value = everything[name]
        try:
            given[name] = whole_number({name: value.item() if isinstance(value, np.generic) else value}, name)
        except ValueError as err:
            frame.problems.append((f"{what} that is no integer", str(err)))
    for name, value in given.items():
        if not bounds[0] <= value <= bounds[1]:
            frame.problems.append((f"{what} out of range", f"{name}={value}"))
    if len(set(given.values())) > 1:
        frame.problems.append((f"two values of {what}", ", ".join(f"{k}={v}" for k, v in given.items())))
    if not given:
        return None
    name, value = next(iter(given.items()))
    frame.found[what] = name
    return value
