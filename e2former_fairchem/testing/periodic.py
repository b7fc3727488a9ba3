"""Periodic structures: images, supercells, stress."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from e2former_fairchem.testing.base import PotentialTests
from e2former_fairchem.testing.data import water_box
from e2former_fairchem.testing.equivariance import dtypes


class PeriodicTests(PotentialTests):
    """A crystal's energy does not depend on how its cell is written down, and its stress is the strain derivative."""

    @dtypes
    def test_supercell(self, dtype: torch.dtype) -> None:
        atoms = water_box()
        one, many = self.predict(atoms, dtype), self.predict(atoms.repeat((2, 1, 2)), dtype)
        self.assert_close(many.energy / 4, one.energy, dtype)
        self.assert_close(many.forces[: len(atoms)], one.forces, dtype)

    @dtypes
    def test_moves_by_lattice_vectors(self, dtype: torch.dtype) -> None:
        atoms = water_box()
        moved = atoms.copy()
        moved.positions[1] += 2 * atoms.cell[0] - atoms.cell[2]
        moved.positions[4] -= 3 * atoms.cell[1]
        before, after = self.predict(atoms, dtype), self.predict(moved, dtype)
        self.assert_close(after.energy, before.energy, dtype)
        self.assert_close(after.forces, before.forces, dtype)

    @dtypes
    def test_slab(self, dtype: torch.dtype) -> None:
        """Along a direction that is not periodic the cell's length is meaningless."""
        atoms = water_box(pbc=(True, True, False))
        tall = atoms.copy()
        tall.cell[2] *= 3
        before, after = self.predict(atoms, dtype), self.predict(tall, dtype)
        self.assert_close(after.energy, before.energy, dtype)
        self.assert_close(after.forces, before.forces, dtype)

    def test_stress(self) -> None:
        """Against central differences of the energy in all nine components of the strain."""
        atoms = water_box()
        analytic = self.predict(atoms).stress
        if analytic is None:
            pytest.skip("the model does not predict stress")
        step = 1e-4
        numeric = np.zeros((3, 3))
        for a in range(3):
            for b in range(3):
                energies = []
                for sign in (1, -1):
                    strain = np.eye(3)
                    strain[a, b] += 0.5 * sign * step
                    strain[b, a] += 0.5 * sign * step
                    bent = atoms.copy()
                    bent.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                    energies.append(float(self.predict(bent).energy))
                numeric[a, b] = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        expected = torch.tensor(numeric)
        got = analytic.detach().view(3, 3).double()
        assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
