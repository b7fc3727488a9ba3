"""Rotation, translation, permutation, reflection, and independence of the batch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms

from e2former_fairchem.testing.base import PotentialTests
from e2former_fairchem.testing.data import random_molecule, random_rotation, water_box

GRID = 2.0**-12  # Å; coordinates on it stay exact in float32 up to 4096 Å
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def on_grid(atoms: Atoms) -> Atoms:
    """A copy with positions rounded to multiples of 2^-12 Å."""
    atoms = atoms.copy()
    atoms.positions = np.round(atoms.positions / GRID) * GRID
    return atoms


class EquivarianceTests(PotentialTests):
    """Energy invariant, forces (and stress) equivariant; a structure's result does not depend on its batch."""

    #: forces after a move by 1000 Å, relative to their rms, in float32
    translation_tolerance: ClassVar[float] = 1e-5
    #: whether mirror images have equal energies
    reflection: ClassVar[bool] = False

    @dtypes
    def test_rotation(self, dtype: torch.dtype) -> None:
        atoms, rotation = random_molecule(), random_rotation(1)
        turned = atoms.copy()
        turned.positions = atoms.positions @ rotation.T
        before, after = self.predict(atoms, dtype), self.predict(turned, dtype)
        self.assert_close(after.energy, before.energy, dtype)
        self.assert_close(after.forces, before.forces @ torch.tensor(rotation.T, dtype=dtype), dtype)

    @dtypes
    def test_rotation_of_a_crystal(self, dtype: torch.dtype) -> None:
        atoms, rotation = water_box(), random_rotation(2)
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ rotation.T)
        turned.positions = atoms.positions @ rotation.T
        before, after = self.predict(atoms, dtype), self.predict(turned, dtype)
        self.assert_close(after.energy, before.energy, dtype)
        self.assert_close(after.forces, before.forces @ torch.tensor(rotation.T, dtype=dtype), dtype)

    @dtypes
    def test_translation(self, dtype: torch.dtype) -> None:
        atoms = on_grid(random_molecule())
        moved = atoms.copy()
        moved.positions += [1000.0, -1000.0, 1000.0]
        before, after = self.predict(atoms, dtype), self.predict(moved, dtype)
        tolerance = 1e-10 if dtype == torch.float64 else self.translation_tolerance
        rms = float(before.forces.square().mean().sqrt())
        assert float((after.forces - before.forces).abs().max()) <= tolerance * rms
        self.assert_close(after.energy, before.energy, dtype)

    @dtypes
    def test_permutation(self, dtype: torch.dtype) -> None:
        atoms = random_molecule()
        order = np.random.default_rng(0).permutation(len(atoms))
        before, after = self.predict(atoms, dtype), self.predict(atoms[order], dtype)
        self.assert_close(after.energy, before.energy, dtype)
        self.assert_close(after.forces, before.forces[torch.tensor(order)], dtype)

    @dtypes
    def test_batch_independence(self, dtype: torch.dtype) -> None:
        ion = random_molecule("NH3", seed=3)
        ion.info.update(charge=1, spin=2)
        structures = [random_molecule(), water_box(), ion, Atoms("O", [[0, 0, 0]])]
        together = self.predict(structures, dtype)
        start = 0
        for n, atoms in enumerate(structures):
            alone = self.predict(atoms, dtype)
            self.assert_close(together.energy[n : n + 1], alone.energy, dtype)
            forces = together.forces[start : start + len(atoms)]
            self.assert_close(forces, alone.forces, dtype, scale=float(together.forces.abs().max()))
            start += len(atoms)

    def test_reflection(self) -> None:
        atoms = random_molecule("CH3CH2OH", seed=5, displacement=0.2)  # chiral by its displacements
        mirrored = atoms.copy()
        mirrored.positions[:, 0] *= -1
        before, after = self.predict(atoms), self.predict(mirrored)
        if self.reflection:
            self.assert_close(after.energy, before.energy, torch.float64)
            flip = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
            self.assert_close(after.forces, before.forces * flip, torch.float64)
        else:
            assert float((after.energy - before.energy).abs()) > 1e-8 * float(before.energy.abs())
