r"""Size-extensivity: n copies far apart have n times the energy, a supercell of n cells too.

The gap between molecules is larger than any cutoff, so that no edge joins them; a model with global attention or a
length-dependent readout shows here. Copies carry the charge n q and the multiplicity n (m - 1) + 1 (parallel spins); a
model that reads a system's total charge at every atom need not be extensive where q is not 0 or m is not 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms
from ase.build import make_supercell

from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Metric, Outcome


@dataclass(frozen=True)
class ExtensivitySettings:
    """Settings.

    Attributes:
        systems: see `systems.load_systems`.
        copies: numbers of copies.
        gap: empty space between two copies, Å; must exceed the cutoff.
        max_energy: largest |E_n / n - E_1|, meV.
        max_force: largest difference of a force component from the single system's, eV/Å.
    """

    systems: list[str] = field(default_factory=lambda: ["H2O", "CH3OH", "ammonia_crystal"])
    copies: list[int] = field(default_factory=lambda: [2, 4, 8])
    gap: float = 30.0
    max_energy: float | None = 0.01
    max_force: float | None = 1e-5

    def __post_init__(self) -> None:
        if min(self.copies) < 2:
            raise ValueError(f"extensivity.copies: expected numbers from 2, got {list(self.copies)}")


def _split(number: int) -> list[int]:
    """Three factors of a number, as equal as its prime factors let them be: 8 -> 2, 2, 2."""
    factors, prime = [1, 1, 1], 2
    primes = []
    while number > 1:
        while number % prime == 0:
            primes.append(prime)
            number //= prime
        prime += 1
    for one in sorted(primes, reverse=True):
        factors[factors.index(min(factors))] *= one
    return factors


def copies_of(atoms: Atoms, number: int, gap: float) -> Atoms:
    """`number` copies: of the cell along its periodic axes, or of a molecule along x with `gap` Å between them.

    Copy c holds the atoms c n ... (c + 1) n - 1.
    """
    if atoms.pbc.all():
        large = make_supercell(atoms, np.diag(_split(number)), order="cell-major")
    elif atoms.pbc.any():
        diagonal = [1, 1, 1]
        diagonal[int(np.flatnonzero(atoms.pbc)[0])] = number
        large = make_supercell(atoms, np.diag(diagonal), order="cell-major")
    else:
        width = float(np.ptp(atoms.positions[:, 0])) + gap
        large = atoms.copy()
        for copy in range(1, number):
            moved = atoms.copy()
            moved.positions[:, 0] += copy * width
            large += moved
    large.info = {
        **atoms.info,
        "charge": int(atoms.info["charge"]) * number,
        "spin": (int(atoms.info["spin"]) - 1) * number + 1,
    }
    return large


def check(
    potential: Potential, name: str, atoms: Atoms, settings: ExtensivitySettings, rng: np.random.Generator
) -> Outcome:
    """One system. Curves: `copies` and `deviation`, |E_n / n - E_1| in meV.

    Raises:
        ValueError: a gap within the model's cutoff.
    """
    if potential.cutoff is not None and settings.gap <= potential.cutoff:
        raise ValueError(f"extensivity.gap: expected more than the cutoff {potential.cutoff} Å, got {settings.gap}")
    numbers = sorted(set(settings.copies))
    energies, forces = potential.evaluate([atoms, *(copies_of(atoms, n, settings.gap) for n in numbers)])
    deviations = 1000 * np.abs(energies[1:] / numbers - energies[0])
    single = forces[0].reshape(1, -1)
    apart = [np.abs(f.reshape(n, -1) - single).max() for n, f in zip(numbers, forces[1:], strict=True)]
    rounding = 2 * 1000 * potential.resolution(atoms)  # of two energies
    word = "cells" if atoms.pbc.any() else "copies"
    metrics = [
        Metric(f"E_{numbers[0]} / {numbers[0]} - E_1, {word}", deviations[0], "meV", settings.max_energy, rounding),
    ]
    if len(numbers) > 1:
        name = f"E_n / n - E_1, n up to {numbers[-1]}, max"
        metrics.append(Metric(name, deviations.max(), "meV", settings.max_energy, rounding))
    metrics.append(Metric("forces in copies - forces in one, max", float(max(apart)), "eV/Å", settings.max_force))
    return Outcome(metrics, {"copies": numbers, "deviation": deviations.tolist()})
