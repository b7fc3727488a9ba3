"""First and second derivatives in positions and cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from ase import Atoms
from torch import Tensor

from e2former_fairchem.testing.base import PotentialTests
from e2former_fairchem.testing.data import atomic_data, random_molecule, water_box


class GradientTests(PotentialTests):
    """The energy's derivatives are the forces, and are themselves differentiable."""

    def energy_of(self, atoms: Atoms, pos: Tensor, cell: Tensor) -> Tensor:
        """Energy as a differentiable function of positions and cell."""
        data = atomic_data([atoms], torch.float64, self.dataset)
        data.pos, data.cell = pos, cell
        return self.model(torch.float64)(data)["energy"]["energy"]

    def _inputs(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        data = atomic_data([atoms], torch.float64, self.dataset)
        return data.pos.clone().requires_grad_(), data.cell.clone().requires_grad_()

    def test_gradcheck(self) -> None:
        atoms = water_box()
        with self._graph_kept():
            assert torch.autograd.gradcheck(
                lambda pos, cell: self.energy_of(atoms, pos, cell), self._inputs(atoms), atol=1e-6, rtol=1e-5
            )

    def test_gradgradcheck(self) -> None:
        atoms = water_box()[:3]  # one molecule and its images
        with self._graph_kept():
            assert torch.autograd.gradgradcheck(
                lambda pos, cell: self.energy_of(atoms, pos, cell), self._inputs(atoms), atol=1e-6, rtol=1e-5
            )

    @contextlib.contextmanager
    def _graph_kept(self) -> Iterator[None]:
        """In training mode the graph outlives the forces that the model itself takes from it."""
        model = self.model(torch.float64)
        model.train()
        try:
            yield
        finally:
            model.eval()

    def test_forces_are_minus_the_gradient(self) -> None:
        atoms = random_molecule()
        forces = self.predict(atoms).forces
        step = 1e-5
        for atom, axis in ((0, 0), (3, 1), (8, 2)):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[atom, axis] += sign * step
                energies.append(float(self.predict(moved).energy))
            numeric = -(energies[0] - energies[1]) / (2 * step)
            assert abs(numeric - float(forces[atom, axis])) <= 1e-6 * float(forces.abs().max())
