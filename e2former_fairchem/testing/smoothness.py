"""Continuity where an atom crosses the cutoff, and atoms without neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from e2former_fairchem.testing.base import PotentialTests
from e2former_fairchem.testing.data import random_molecule


def probe_at(host: Atoms, distance: float) -> Atoms:
    """The host with an oxygen atom on the outward ray from its first atom, at a distance (Å) from that atom."""
    direction = host.positions[0] - host.positions.mean(0)
    direction /= np.linalg.norm(direction)
    return host + Atoms("O", [host.positions[0] + distance * direction])


class SmoothCutoffTests(PotentialTests):
    """Energy and forces do not jump when a pair crosses the cutoff, the last neighbour included."""

    cutoff: ClassVar[float] = 5.0
    #: largest allowed jump, relative to the energy's spread over a scan through the cutoff
    jump_tolerance: ClassVar[float] = 1e-9

    def _crossings(self, host: Atoms) -> list[float]:
        """Probe distances at which a host atom leaves the probe's neighbourhood."""
        out = []
        for n in range(len(host)):
            low, high = 0.5, self.cutoff + 10
            for _ in range(200):
                middle = 0.5 * (low + high)
                inside = probe_at(host, middle).get_distance(n, len(host)) < self.cutoff
                low, high = (middle, high) if inside else (low, middle)
            out.append(low)
        return sorted(out)

    def _scan(self, host: Atoms, distances: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Energies [K] and forces [K, N, 3] with the probe at K distances, in one batch."""
        prediction = self.predict([probe_at(host, d) for d in distances])
        return prediction.energy, prediction.forces.view(len(distances), -1, 3)

    def test_limit_of_the_jump(self) -> None:
        """E(+h) - E(-h) less the slope beside it: a smooth change cancels up to the square of h, a jump stays."""
        host, step = random_molecule(), 1e-6
        energies, forces = self._scan(host, np.linspace(2.0, self.cutoff + 1.0, 40))
        spread, force_scale = float(energies.std()), float(forces.abs().max())
        crossings = self._crossings(host)  # the last one leaves the probe without neighbours
        energies, forces = self._scan(host, [c + k * step for c in crossings for k in (-3, -1, 1, 3)])
        for n, crossing in enumerate(crossings):
            e, f = energies[4 * n : 4 * n + 4], forces[4 * n : 4 * n + 4]
            jump = float((e[2] - e[1]) - (e[3] - e[0]) / 3)
            assert abs(jump) <= self.jump_tolerance * spread, (
                f"limit of the jump at {crossing:.6f} Å: {abs(jump) / spread:.1e} of the energy's spread"
            )
            force_jump = float((f[2] - f[1]).abs().max())
            assert force_jump <= 1e-4 * force_scale, f"forces jump by {force_jump:.2e} at {crossing:.6f} Å"

    def test_isolated_atoms(self) -> None:
        """No neighbours: finite energies that tell elements apart, zero forces."""
        carbon, oxygen = (self.predict(Atoms(s, [[0.0, 0.0, 0.0]])) for s in "CO")
        far = self.predict(Atoms("CO", [[0.0, 0.0, 0.0], [0.0, 0.0, 100.0]]))
        assert torch.isfinite(carbon.energy).all() and torch.isfinite(oxygen.energy).all()
        assert float((carbon.energy - oxygen.energy).abs()) > 1e-6
        self.assert_close(far.energy, carbon.energy + oxygen.energy, torch.float64)
        assert float(far.forces.abs().max()) == 0.0
