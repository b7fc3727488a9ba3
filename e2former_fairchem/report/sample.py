"""Random samples and histograms of a stream of unknown length, in memory of fixed size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Edges of the histograms of absolute errors: 25 bins a decade from 1e-7 to 1e3 eV or eV/Å.
EDGES = np.logspace(-7, 3, 251)


class Sample:
    """A uniform sample of at most `size` rows of a stream, without replacement.

    Every row draws a random key, and the rows with the smallest keys stay. Two samples of disjoint streams become one
    of their union in the same way, whatever their lengths.

    Args:
        size: rows to keep.
        columns: numbers in a row.
        seed: of the keys; another one for each stream.
    """

    def __init__(self, size: int, columns: int, seed: tuple[int, ...] = (0,)) -> None:
        self.size = size
        self.rows = np.empty((0, columns), np.float32)
        self.keys = np.empty(0)
        self._random = np.random.default_rng(seed)

    def add(self, rows: NDArray) -> None:
        """Add rows [n, columns] of the stream."""
        keys = self._random.random(len(rows))
        if len(self.keys) == self.size:
            small = keys < self.keys.max(initial=0.0)
            rows, keys = rows[small], keys[small]
        self._keep(rows, keys)

    def merge(self, other: Sample) -> None:
        """Add another stream's sample."""
        self._keep(other.rows, other.keys)

    def _keep(self, rows: NDArray, keys: NDArray) -> None:
        if len(keys) == 0:
            return
        rows, keys = np.concatenate([self.rows, rows.astype(np.float32)]), np.concatenate([self.keys, keys])
        if len(keys) > self.size:
            smallest = np.argpartition(keys, self.size)[: self.size]
            rows, keys = rows[smallest], keys[smallest]
        self.rows, self.keys = rows, keys


def histogram(errors: NDArray) -> NDArray[np.int64]:
    """Counts of absolute errors in the bins of `EDGES`; what lies outside counts in the first or last bin."""
    return np.histogram(np.clip(errors, EDGES[0], EDGES[-1]), EDGES)[0]


def quantile(counts: NDArray, share: float) -> float:
    """The error that a share of the counted ones stays below, by interpolation in the bin (10 % wide); NaN for none."""
    total = counts.sum()
    if total == 0:
        return float("nan")
    below = np.concatenate([[0], np.cumsum(counts)]) / total
    i = min(int(np.searchsorted(below, share, side="left")), len(EDGES) - 1)
    if i == 0:
        return float(EDGES[0])
    part = (share - below[i - 1]) / (below[i] - below[i - 1])
    return float(EDGES[i - 1] * (EDGES[i] / EDGES[i - 1]) ** part)
