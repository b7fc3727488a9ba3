"""First and second derivatives in positions and cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from e2former_fairchem.testing.base import PotentialTests
from e2former_fairchem.testing.data import atomic_data, random_molecule, water_box


class GradientTests(PotentialTests):
    """The energy's derivatives are the forces, and are themselves differentiable."""

    def energy_of(self, pos: Tensor, cell: Tensor | None = None) -> Tensor:
        """Energy as a differentiable function of a water box's positions (and cell)."""
        data = atomic_data([water_box() if cell is not None else random_molecule("H2O")], torch.float64, self.dataset)
        data.pos = pos
        if cell is not None:
            data.cell = cell
        return self.model(torch.float64)(data)["energy"]["energy"]

    def test_gradcheck(self) -> None:
        data = atomic_data([water_box()], torch.float64, self.dataset)
        pos, cell = data.pos.clone().requires_grad_(), data.cell.clone().requires_grad_()
        with self._graph_kept():
            assert torch.autograd.gradcheck(self.energy_of, (pos, cell), atol=1e-6, rtol=1e-5)

    def test_gradgradcheck(self) -> None:
        data = atomic_data([random_molecule("H2O")], torch.float64, self.dataset)
        pos = data.pos.clone().requires_grad_()
        with self._graph_kept():
            assert torch.autograd.gradgradcheck(self.energy_of, (pos,), atol=1e-6, rtol=1e-5)

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
