"""With frozen weights, features that a norm and a product recompute are not kept: same numbers, less memory."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from e2former_fairchem.captured import Atoms
from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_kernels.common.backend import triton_installed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)

ATOMS, CHANNELS, LAYERS = 5, 8, 1


class LiveFeatures(TorchDispatchMode):
    """Counts the tensors of the size of node features that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() == ATOMS * 4 * CHANNELS * tensor.element_size() and id(storage) not in self.alive:
                    self.alive.add(id(storage))
                    weakref.finalize(storage, self.alive.discard, id(storage))
        return out


def network(score: str) -> E2FormerV2:
    torch.manual_seed(0)
    config = E2FormerV2Config(
        lmax=1,
        sphere_channels=CHANNELS,
        num_layers=LAYERS,
        num_heads=4,
        head_dim=2,
        num_radial_basis=8,
        score=score,
        max_num_elements=10,
        kernel_backend="triton",
    )
    return E2FormerV2(config).double().freeze()


@pytest.fixture
def evaluate() -> Callable[[E2FormerV2, bool], tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pos = (3 * torch.rand(ATOMS, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    zeros = torch.zeros(ATOMS, dtype=torch.long)
    cell, pbc = torch.eye(3, dtype=torch.float64).unsqueeze(0), torch.zeros(1, 3, dtype=torch.bool)

    def run(model: E2FormerV2, recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
        graph = build_graph(pos, cell, pbc, zeros, torch.tensor([ATOMS]), 6.0)
        atoms = Atoms(torch.tensor([1, 6, 8, 1, 1]), zeros[:1], zeros[:1], zeros)
        execution = model._choose(graph, atoms.atomic_numbers)
        assert execution.recompute_features
        execution = dataclasses.replace(execution, recompute_features=recompute)
        return model.evaluate(atoms, graph, pos=pos, execution=execution).square().sum(), pos

    return run


@pytest.mark.parametrize("score", ["qk", "qk_dot"])
def test_same_derivatives_from_fewer_tensors(score: str, evaluate) -> None:
    found = {}
    for recompute in (True, False):
        model = network(score)
        evaluate(model, recompute)  # tables of the radial networks
        with LiveFeatures() as live:
            energy, pos = evaluate(model, recompute)
            gc.collect()  # some tensors are in cycles
            kept = len(live.alive)
        (forces,) = torch.autograd.grad(energy, pos, create_graph=True)
        (hessian,) = torch.autograd.grad(forces[0, 0], pos)
        found[recompute] = kept, (energy, forces, hessian)
    # of each layer the value goes, and the normalised features where nothing else reads them (a directional gate does)
    assert found[True][0] <= found[False][0] - LAYERS * (2 if score == "qk" else 1)
    for mine, expected in zip(found[True][1], found[False][1], strict=True):
        assert torch.equal(mine, expected)
    assert float(found[True][1][2].abs().max()) > 1e-6
