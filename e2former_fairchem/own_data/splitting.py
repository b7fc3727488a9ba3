"""Which structures are trained on and which validate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from e2former_fairchem.own_data.reading import Frame

COMPOSITION = "composition"


def split(
    frames: Sequence[Frame], fraction: float, seed: int = 0, by: str | None = None
) -> tuple[list[Frame], list[Frame]]:
    """Training and validation frames, each in the order of the files.

    Drawn at random: single frames, or with `by` whole groups. What validates never holds an element's only training
    frames, nor an isolated atom.

    Args:
        frames: all of them.
        fraction: share that validates, above 0 and below 1; at least one frame does.
        seed: of the draw.
        by: `composition`, or a key of the structures' info whose value names the group.

    Raises:
        ValueError: a fraction out of range, a frame without the key, or nothing that can be spared.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--valid-fraction: expected a number above 0 and below 1, got {fraction:g}")
    groups: dict[object, list[int]] = {}
    for index, frame in enumerate(frames):
        groups.setdefault(_group(frame, index, by), []).append(index)
    wanted = max(1, round(fraction * len(frames)))
    left = Counter(z for frame in frames for z in set(frame.atoms.numbers.tolist()))
    chosen: set[int] = set()
    order = list(groups.values())
    np.random.default_rng(seed).shuffle(order)
    for members in order:
        if len(chosen) >= wanted:
            break
        taken = Counter(z for n in members for z in set(frames[n].atoms.numbers.tolist()))
        too_many = len(chosen) + len(members) > max(2 * wanted, 1) and bool(chosen)
        needed = any(left[z] == number for z, number in taken.items())
        if too_many or needed or any(frames[n].is_isolated_atom for n in members):
            continue
        left -= taken
        chosen.update(members)
    if not chosen:
        what = "frames" if by is None else f"groups ({by})"
        raise ValueError(
            f"--valid-fraction: expected {what} to validate on that leave each element in the training data, got none "
            f"among {len(frames)} frames in {len(groups)} groups; give a file with --valid"
        )
    return (
        [frame for n, frame in enumerate(frames) if n not in chosen],
        [frame for n, frame in enumerate(frames) if n in chosen],
    )


def _group(frame: Frame, index: int, by: str | None) -> object:
    if by is None:
        return index
    if by == COMPOSITION:
        return frame.atoms.get_chemical_formula()
    if by not in frame.info:
        raise ValueError(
            f"--split-by: expected {COMPOSITION} or a key of every structure's info, got {by!r}, which {frame.file}, "
            f"frame {frame.number}, does not have"
        )
    return str(frame.info[by])
