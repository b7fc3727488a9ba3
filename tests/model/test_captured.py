"""The trunk with padded inputs, and (on a GPU) replayed from CUDA graphs, is the trunk."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from e2former_fairchem.captured import Atoms, PaddedInputs, Replays, padded_capacity
from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.execution import Execution
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.testing import atomic_data
from e2former_kernels.common.chunks import SeveralChunks

SMALL = {"lmax": 1, "sphere_channels": 8, "num_layers": 2, "num_heads": 4, "head_dim": 2, "num_radial_basis": 8}


def network(dtype: torch.dtype, device: str = "cpu", **config: object) -> E2FormerV2:
    torch.manual_seed(0)
    trunk = E2FormerV2(E2FormerV2Config(**(SMALL | {"cutoff": 3.0} | config)))
    return trunk.to(device, dtype).freeze()


def inputs(dtype: torch.dtype, stretch: float = 1.0, device: str = "cpu", cutoff: float = 3.0) -> tuple[Atoms, Graph]:
    """Two molecules; a stretched pair has fewer edges."""
    systems = [molecule("CH3CH2OH"), molecule("H2O")]
    for atoms in systems:
        atoms.positions *= stretch
    data = atomic_data(systems, dtype).to(device)
    pos = data["pos"].requires_grad_()
    graph = build_graph(pos, data["cell"], data["pbc"], data["batch"], data["natoms"], cutoff)
    charge = torch.tensor([1, 0], device=device)
    return Atoms(data["atomic_numbers"].long(), charge, charge + 1, data["batch"]), graph


def value_and_gradient(trunk: E2FormerV2, atoms: Atoms, graph: Graph, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = trunk.evaluate(atoms, graph)[: weight.shape[0]]
    return x, torch.autograd.grad((x * weight).sum(), graph.vec)[0]


@pytest.mark.parametrize("stretches", [(1.0, 1.0), (1.0, 1.3, 0.9)])
def test_padding_atoms_are_another_molecule(stretches: tuple[float, ...], float64_default: None) -> None:
    """The same fixed memory, filled with lists of different lengths, down to no free edge at all."""
    trunk = network(torch.float64)
    sets = [inputs(torch.float64, s) for s in stretches]
    most = max(graph.num_edges for _, graph in sets)
    assert len(stretches) < 3 or len({graph.num_edges for _, graph in sets}) > 1
    padding = padded_capacity(sets[0][1].num_nodes, most)
    for room in (padding, padding._replace(edges=most)):
        padded = PaddedInputs(*sets[0], room)
        for atoms, graph in sets:
            weight = torch.randn(graph.num_nodes, 4, 8)
            expected = value_and_gradient(trunk, atoms, graph, weight)
            padded.fill(atoms, graph)
            vec = padded.vec.clone().requires_grad_()
            wide = padded.graph(vec)
            assert torch.equal(wide.source_order, torch.argsort(wide.source, stable=True))
            assert torch.equal(wide.row_ptr, torch.searchsorted(wide.target, torch.arange(wide.num_nodes + 1)))
            assert torch.equal(
                wide.source_ptr, torch.searchsorted(wide.source[wide.source_order], torch.arange(wide.num_nodes + 1))
            )
            x, grad = value_and_gradient(trunk, padded.atoms, wide, weight)
            torch.testing.assert_close(x, expected[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad[: graph.num_edges], expected[1], rtol=1e-12, atol=1e-12)


def test_only_evaluations_in_a_row_are_captured() -> None:
    """A sweep over molecules captures nothing, however often each size comes up."""
    made = []

    def refuse(*arguments) -> None:
        made.append(arguments)
        raise SeveralChunks

    trunk, replays, execution = network(torch.float32), Replays(refuse), Execution("frozen", elements=(1, 6, 8))
    sets = [inputs(torch.float32), inputs(torch.float32)]
    sets[1] = sets[1][0], dataclasses.replace(sets[1][1], num_nodes=13)
    for n in (0, 1) * 5:
        assert replays(trunk, *sets[n], execution) is None
    assert not made
    for _ in range(6):
        assert replays(trunk, *sets[0], execution) is None
    assert len(made) == 1  # found to be too large, and not tried again


@pytest.mark.gpu
def test_replays_on_a_gpu() -> None:
    """Positions move, lists change length, and every number is that of the trunk without graphs."""
    trunk, plain = (network(torch.float32, "cuda", cuda_graph=flag) for flag in (True, False))
    weight = torch.randn(12, 4, 8, device="cuda")

    def gradient(model: E2FormerV2, x: Tensor, graph: Graph) -> Tensor:
        return torch.autograd.grad((x * weight).sum(), graph.vec)[0]

    def call(model: E2FormerV2, stretch: float) -> tuple[Tensor, Graph]:
        atoms, graph = inputs(torch.float32, stretch, "cuda")
        return model(*atoms[:3], atoms.batch, None, graph), graph

    for stretch in (1.0, 1.001, 1.002, 1.003, 1.3, 0.9, 1.0, 1.0, 1.0, 1.0):
        (x, graph), (y, other) = call(trunk, stretch), call(plain, stretch)
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient(trunk, x, graph), gradient(plain, y, other), rtol=1e-5, atol=1e-6)
    assert trunk.execution == "replayed" and plain.execution == "frozen"
    # a gradient twice, the second without what the first has used up
    x, graph = call(trunk, 1.0)
    loss = (x * weight).sum()
    expected, again = (torch.autograd.grad(loss, graph.vec, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    # an evaluation whose activations a later one has overwritten
    x, graph = call(trunk, 1.0)
    call(trunk, 1.01)
    torch.testing.assert_close(gradient(trunk, x, graph), expected, rtol=1e-5, atol=1e-6)
    # second derivatives
    found = []
    for model in (trunk, plain):
        x, graph = call(model, 1.0)
        (g,) = torch.autograd.grad((x * weight).sum(), graph.vec, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), graph.vec)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    # weights that change in place
    with torch.no_grad():
        for model in (trunk, plain):
            for p in model.parameters():
                p.mul_(0.9)
    for _ in range(4):
        torch.testing.assert_close(call(trunk, 1.0)[0], call(plain, 1.0)[0], rtol=1e-6, atol=1e-6)
    # gradients of the weights
    trunk.unfreeze()
    x, _ = call(trunk, 1.0)
    x.sum().backward()
    assert trunk.blocks[0].attention.value.weight.grad.abs().max() > 0
