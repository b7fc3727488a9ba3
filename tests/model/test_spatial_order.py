"""Atoms in the order of a space-filling curve: the same network, and the caller's order back."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from ase import Atoms

from e2former_fairchem import model as model_module
from e2former_fairchem import spatial_order as module
from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.testing import atomic_data


def systems(*sides: int) -> list[Atoms]:
    """Clusters on cubic lattices of so many sites a side, their atoms in random order."""
    rng = np.random.default_rng(0)
    found = []
    for side in sides:
        sites = 3.0 * np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
        sites = rng.permutation(sites + rng.normal(0, 0.2, sites.shape))
        found.append(Atoms(rng.choice([1, 6, 8], len(sites)), sites))
    return found


def graph_of(data, pos: torch.Tensor) -> Graph:
    return build_graph(pos, data.cell, data.pbc, data.batch, data.natoms, 5.0)


def edges(graph: Graph, place: torch.Tensor | None = None) -> set[tuple]:
    """(source, target, vector) of every edge; place: where each atom of the graph stands in the caller's list."""
    number = torch.arange(graph.num_nodes) if place is None else place
    rows = zip(number[graph.source].tolist(), number[graph.target].tolist(), graph.vec.tolist(), strict=True)
    return {(i, j, tuple(vec)) for i, j, vec in rows}


def test_graph_in_another_order() -> None:
    data = atomic_data(systems(math.ceil(module.MIN_ATOMS ** (1 / 3)), 3), torch.float64)
    graph = graph_of(data, data.pos)
    order = module.spatial_order(data.pos, data.batch, graph)
    assert torch.equal(order.order[order.place], torch.arange(graph.num_nodes))
    assert torch.equal(order.atoms(data.batch), data.batch), "systems stay together"
    ordered = order.graph(graph)
    assert edges(ordered, order.order) == edges(graph)
    assert torch.equal(ordered.target, ordered.target.sort().values)
    assert torch.equal(ordered.row_ptr, torch.searchsorted(ordered.target, torch.arange(graph.num_nodes + 1)))
    before, after = ((g.source - g.target).abs().double().mean() for g in (graph, ordered))
    assert after < 0.7 * before
    assert module.spatial_order(order.atoms(data.pos), data.batch, ordered) is None, "good enough already"


def test_small_systems_keep_their_order() -> None:
    data = atomic_data(systems(4, 3), torch.float64)
    assert module.spatial_order(data.pos, data.batch, graph_of(data, data.pos)) is None


@pytest.mark.parametrize("frozen", [True, False])
def test_network_does_not_show_it(frozen: bool, device: str, spy, monkeypatch) -> None:
    """Features and forces are those of the caller's order: in float64 to rounding, and on a GPU, with 4,913 atoms in
    random order, as near to float64 as those are.
    """
    torch.manual_seed(0)
    side, dtype = (17, torch.float32) if device == "cuda" else (2, torch.float64)
    if device == "cpu":
        monkeypatch.setattr(module, "MIN_ATOMS", 2)  # the interpreter takes minutes for as many
    config = E2FormerV2Config(
        lmax=1,
        sphere_channels=8,
        num_layers=1,
        num_heads=4,
        head_dim=2,
        num_radial_basis=8,
        max_num_elements=10,
        kernel_backend="triton",
        cutoff=5.0,
        cuda_graph=False,
    )
    model = E2FormerV2(config).to(device, dtype)
    exact = E2FormerV2(dataclasses.replace(config, kernel_backend="reference")).to(device).double()
    exact.load_state_dict(model.state_dict())
    if frozen:
        model.freeze()
    data = atomic_data(systems(side), torch.float64).to(device)
    zeros = torch.zeros(1, dtype=torch.long, device=device)

    def features_and_forces(network: E2FormerV2, dtype: torch.dtype, ordered: bool) -> list[torch.Tensor]:
        pos = data.pos.to(dtype).requires_grad_()
        graph = graph_of(data, pos)
        x = network(data.atomic_numbers, zeros, zeros, data.batch, pos if ordered else None, graph)
        weight = torch.linspace(-1, 1, x.numel(), device=device).to(dtype).view_as(x)
        (forces,) = torch.autograd.grad((weight * x).sum(), pos)
        return [x.detach().double(), forces.double()]

    asked = spy(model_module, "spatial_order")
    # with frozen weights the second evaluation makes splines
    found = [features_and_forces(model, dtype, ordered) for ordered in (False, True, False)]
    assert [order is None for _, order in asked] == [True, False, True]
    for ordered, own, truth in zip(*found[1:], features_and_forces(exact, torch.float64, False), strict=True):
        if device == "cpu":
            assert float((ordered - own).abs().max()) < 1e-12 * float(own.abs().max())
        error, budget = (float((t - truth).norm() / truth.norm()) for t in (ordered, own))
        assert error <= 1.5 * budget + 1e-7 and budget < 1e-4
