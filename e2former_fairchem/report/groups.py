"""Sums of a set's errors by charge, by spin and by size, ready for figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from e2former_fairchem.report.errors import ENERGY_SUMS, FORCE_SUMS, GROUP_SUMS, SetErrors


def has_energy(errors: SetErrors) -> bool:
    """Whether any energy was compared."""
    return errors.energy[ENERGY_SUMS.index("count")] > 0


def has_forces(errors: SetErrors) -> bool:
    """Whether any force was compared."""
    return errors.forces[FORCE_SUMS.index("count")] > 0


def marginal(table: Mapping[tuple[int, ...], NDArray], column: int) -> dict[int, NDArray]:
    """Sums by one of the numbers in the key."""
    found: dict[int, NDArray] = {}
    for key, row in table.items():
        found[key[column]] = found.get(key[column], 0.0) + row
    return found


def size_bins(sets: Sequence[SetErrors]) -> list[tuple[int, int]]:
    """Ranges of atom counts (first, last): each its own where there are few, else about fifteen of growing width."""
    sizes = sorted({key[0] for s in sets for key in s.sizes})
    if len(sizes) <= 24:
        return [(size, size) for size in sizes]
    edges = np.unique(np.round(np.geomspace(sizes[0], sizes[-1] + 1, 16)).astype(int))
    return [(int(a), int(b) - 1) for a, b in pairwise(edges)]


def binned(errors: SetErrors, bins: Sequence[tuple[int, int]]) -> list[NDArray]:
    """Sums of a set in each bin of `size_bins`."""
    empty = np.zeros(len(GROUP_SUMS))
    return [sum((row for (n,), row in errors.sizes.items() if a <= n <= b), start=empty) for a, b in bins]
