r"""What rounding does to a model's energies, measured.

A network's energy is what is left of larger numbers, so that its own size says little about its rounding: small
energies are off by forty units in their last place. Rounding shows in fourth differences of the energy along a line, in
steps d so small that d^4 E^(4) is below a unit in the last place of an electronvolt: what is smooth falls out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ase import Atoms

_LINES, _POINTS = 2, 12
# Variance of a fourth difference of independent numbers: 1 + 16 + 36 + 16 + 1.
_VARIANCE = 70
# Median of |x| for a normal distribution of unit variance.
_MEDIAN = 0.6745
# Step along every coordinate: this times eps^(1/4), Å; 1e-3 Å in single precision.
_STEP = 0.05
# Ångström away from the structure: a symmetric one may lie on a jump of the model, which is no rounding.
_AWAY = 0.01
# What is called rounding is this many standard deviations.
_DEVIATIONS = 4


def energy_rounding(evaluate: Callable[[Sequence[Atoms]], np.ndarray], atoms: Atoms, eps: float) -> float:
    """Four standard deviations of an energy's rounding near a structure, and at least 8 eps of its size; eV.

    Args:
        evaluate: energies [n] in eV of structures.
        atoms: the structure.
        eps: of the model's precision.
    """
    rng = np.random.default_rng(0)
    structures = []
    for _ in range(_LINES):
        origin = rng.normal(scale=_AWAY, size=(len(atoms), 3))
        step = rng.normal(scale=_STEP * eps**0.25, size=(len(atoms), 3))
        for point in range(_POINTS):
            moved = atoms.copy()
            moved.positions += origin + point * step
            structures.append(moved)
    energies = evaluate(structures).reshape(_LINES, _POINTS)
    # the median: a jump of the model that a line happens to cross is in a few differences only
    deviation = np.median(np.abs(np.diff(energies, n=4))) / (_MEDIAN * np.sqrt(_VARIANCE))
    return max(_DEVIATIONS * float(deviation), 8 * eps * float(np.abs(energies).max()))
