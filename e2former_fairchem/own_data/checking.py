"""Structures and labels that should not be trained on, by file and number."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list
from scipy.spatial.distance import pdist

from e2former_fairchem.data.structures import check_structure
from e2former_fairchem.own_data.reading import Frame

#: Å. Nuclei that are closer are on top of each other: H2 at 0.3 Å lies 15 eV above its minimum.
CLOSEST = 0.3
#: eV/Å, on one atom. Molecular dynamics at 1,000 K stays below 20.
MAX_FORCE = 50.0
#: Å. Structures that differ less are the same.
SAME_POSITIONS = 1e-5


def find_problems(frames: Sequence[Frame], max_force: float = MAX_FORCE) -> None:
    """Add to each frame's problems what is wrong with it; of doubled structures the first one stays."""
    seen: dict[bytes, Frame] = {}
    for frame in frames:
        frame.problems += _labels(frame, max_force)
        try:
            check_structure(frame.atoms)
        except ValueError as err:
            frame.problems.append(("an unusable structure", str(err)))
            continue
        if too_close(frame.atoms):
            frame.problems.append((f"atoms closer than {CLOSEST} Å", ""))
        first = seen.setdefault(_fingerprint(frame.atoms), frame)
        if first is not frame:
            where = f"{first.number}" if first.file == frame.file else f"{first.file} {first.number}"
            frame.problems.append(("the same structure as an earlier frame", f"as {where}"))


def _labels(frame: Frame, max_force: float) -> Iterable[tuple[str, str]]:
    spoilt = {kind.split(" ", 1)[0] for kind, _ in frame.problems}
    for label in ("energy", "forces", "stress"):
        value = getattr(frame, label)
        if value is None:
            if label != "stress" and label not in spoilt:
                yield f"no {label}", ""
        elif not np.isfinite(value).all():
            yield f"{label} not finite", ""
        elif label == "forces" and len(value):
            largest = float(np.linalg.norm(value, axis=1).max())
            if largest > max_force:
                yield f"forces above {max_force:g} eV/Å", f"{largest:.4g}"


def too_close(atoms: Atoms) -> bool:
    """Whether two nuclei, or a nucleus and an image, are closer than `CLOSEST`."""
    if atoms.pbc.any():
        return len(neighbor_list("d", atoms, CLOSEST)) > 0
    return len(atoms) > 1 and bool(pdist(atoms.positions).min() < CLOSEST)


def _fingerprint(atoms: Atoms) -> bytes:
    """Of elements, positions, cell, charge and spin."""
    grid = np.rint(np.concatenate([atoms.positions, np.asarray(atoms.cell)]) / SAME_POSITIONS).astype(np.int64)
    state = np.array([*atoms.pbc, atoms.info["charge"], atoms.info["spin"]], dtype=np.int64)
    return hashlib.sha256(b"|".join(part.tobytes() for part in (atoms.numbers, grid, state))).digest()


def describe(frames: Iterable[Frame]) -> list[str]:
    """One line for each file and kind of problem, with the numbers of all its frames."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for frame in frames:
        for kind, detail in frame.problems:
            groups[frame.file, kind].append((frame.number, detail))
    lines = []
    for (file, kind), members in groups.items():
        listed = _numbers(members)
        lines.append(f"{file}: {kind}: frame{'s' if len(members) > 1 else ''} {listed}")
    return lines


def _numbers(members: Sequence[tuple[int, str]]) -> str:
    """`3, 7-9` or, with details, `3 (as 1), 7 (as 2)`."""
    if any(detail for _, detail in members):
        return ", ".join(f"{number} ({detail})" for number, detail in members)
    runs: list[list[int]] = []
    for number, _ in members:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
