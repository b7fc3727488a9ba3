"""Jumps and extrema of functions of one variable that can be evaluated anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
from scipy.signal import find_peaks

ORDER = 8
# The differences of order n of a unit step are binomial coefficients of order n - 1; this is the largest.
_STEP = comb(ORDER - 1, (ORDER - 1) // 2)
#: What an error of every value by up to 1 can do to a jump's size: the sum of the binomial coefficients of order n.
JUMP_ROUNDING = 2**ORDER / _STEP


def jump_estimate(values: np.ndarray) -> np.ndarray:
    r"""Size of the jump that would explain the local departure from a smooth trend.

    For values y_i on a uniform grid of spacing h: \|Δ^8 y\|_i / 35. A jump J gives J there, at any h; a smooth function
    gives h^8 y^(8) / 35, which falls with the eighth power of h.

    Args:
        values: [n, ...]; trailing dimensions are components of which the largest counts.

    Returns:
        [n - 8], for the middle of each nine points; unit of the values.
    """
    differences = np.abs(np.diff(values, n=ORDER, axis=0)) / _STEP
    return differences.reshape(len(differences), -1).max(axis=1, initial=0.0)


@dataclass(frozen=True)
class Jump:
    """The largest jump that was found: `size` (or less) at `place`, on a grid of spacing `step`."""

    size: float
    place: float
    step: float


def find_jumps(
    evaluate: Callable[[np.ndarray], np.ndarray],
    grid: np.ndarray,
    values: np.ndarray,
    limit: float | None,
    zooms: int,
    factor: int = 6,
    candidates: int = 6,
) -> list[Jump]:
    """The largest jumps of a function, as far as they matter: places that depart from a smooth trend, on finer grids.

    A grid's estimate bounds the jumps on it from above, so that only places above the limit are looked at again. Each
    zoom evaluates a grid `factor` times finer around the place. A jump keeps its size; everything smooth, a steep wall
    for example, falls out.

    Args:
        evaluate: function of points [n] that returns values [n, ...].
        grid: uniform, at least 9 points.
        values: of the function on the grid.
        limit: jumps up to this size need no closer look; None: only the worst place gets one.
        zooms: number of refinements.
        factor: of each.
        candidates: number of places that are refined, the worst first.

    Returns:
        The places that were refined, and the worst of those that were not; the largest first.
    """
    if len(grid) <= ORDER:
        raise ValueError(f"grid: expected more than {ORDER} points, got {len(grid)}")
    step = float(grid[1] - grid[0])
    estimates = jump_estimate(values)
    places = grid[ORDER // 2 : len(grid) - ORDER // 2]
    found: list[Jump] = []
    left = np.ones(len(places), dtype=bool)
    while left.any():
        where = int(np.where(left, estimates, -1.0).argmax())
        jump = Jump(float(estimates[where]), float(places[where]), step)
        if len(found) < (1 if limit is None else candidates) and jump.size > (limit or 0.0):
            # Nine points show a jump; the next candidate is farther away.
            left[max(where - ORDER // 2, 0) : where + ORDER // 2 + 1] = False
            found.append(_refine(evaluate, jump, limit or 0.0, zooms, factor))
            continue
        if limit is not None or not found:
            found.append(jump)
        break
    return sorted(found, key=lambda jump: -jump.size)


def _refine(evaluate: Callable[[np.ndarray], np.ndarray], jump: Jump, limit: float, zooms: int, factor: int) -> Jump:
    """The same jump on finer grids, until it is below the limit or all zooms are used."""
    # It is within one interval of the middle of the nine points that show it; two are looked at, and the finer grid
    # needs four points more on either side.
    half = 2 * factor + ORDER // 2
    for _ in range(zooms):
        if jump.size <= limit:
            break
        step = jump.step / factor
        grid = jump.place + step * np.arange(-half, half + 1)
        estimates = jump_estimate(evaluate(grid))
        where = int(estimates.argmax())
        jump = Jump(float(estimates[where]), float(grid[where + ORDER // 2]), step)
    return jump


def extrema(energies: np.ndarray, prominence: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the minima and of the maxima inside a curve [n] that are deeper or higher than `prominence`."""
    minima, _ = find_peaks(-energies, prominence=prominence)
    maxima, _ = find_peaks(energies, prominence=prominence)
    return minima, maxima


def in_ev(value: float | None) -> float | None:
    """meV -> eV; None stays."""
    return None if value is None else value / 1000


def integrate(values: np.ndarray, step: float) -> np.ndarray:
    """Integral from the first point to every other one by Simpson's rule; values [2n + 1] -> [n + 1]."""
    pieces = step / 3 * (values[:-2:2] + 4 * values[1:-1:2] + values[2::2])
    return np.concatenate([[0.0], np.cumsum(pieces)])
