"""No tensor of edge size is ever made where it recomputes: forward, backward and double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch.utils._python_dispatch import TorchDispatchMode

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.testing import atomic_data

HEADS = 8


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation that ran below."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.operation = 0, ""

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # a view or an expansion owns no memory
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.numbers * 8:
                self.numbers = tensor.untyped_storage().nbytes() // 8
                self.operation = f"{func} {tuple(tensor.shape)}"
        return out


def largest_tensor(convolution: str, score: str, max_edges: int | None = None) -> tuple[LargestTensor, int]:
    """Largest tensor of a conserving training step of a cluster in which everybody sees everybody.

    max_edges: of a chunk of receivers.
    """
    torch.manual_seed(0)
    config = E2FormerV2Config(
        sphere_channels=8,
        num_layers=1,
        num_heads=HEADS,
        head_dim=2,
        num_radial_basis=8,
        cutoff=12.0,
        convolution=convolution,
        score=score,
        kernel_backend="reference",
        max_num_elements=10,
    )
    model = E2FormerV2(config)
    rng = np.random.default_rng(0)
    sites = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3) * 1.5
    data = atomic_data([Atoms("H64", sites + rng.normal(0, 0.1, sites.shape))], torch.float64)
    pos = data.pos.requires_grad_()
    graph = build_graph(pos, data.cell, data.pbc, data.batch, data.natoms, config.cutoff)
    graph.edge_list(data.atomic_numbers).max_edges = max_edges
    recorder = LargestTensor()
    with recorder:
        features = model(data.atomic_numbers, data.charge, data.spin, data.batch, pos, graph)
        (gradient,) = torch.autograd.grad(features[:, 0].square().sum(), pos, create_graph=True)
        gradient.square().sum().backward()
    return recorder, graph.source.numel()


@pytest.mark.parametrize(
    ("convolution", "score"),
    [("on_the_fly", "qk"), ("on_the_fly", "qk_dot"), ("on_the_fly", "qk_dot_scalar"), ("eaas", "qk")],
)
def test_nothing_of_edge_size(convolution: str, score: str, float64_default: None) -> None:
    """With two receivers at a time, every tensor stays below edges x heads."""
    recorder, edges = largest_tensor(convolution, score, max_edges=2 * 63)
    assert edges == 64 * 63
    assert recorder.numbers < edges * HEADS, f"{recorder.operation}: {recorder.numbers} numbers"


def test_the_recorder_sees_edge_tensors(float64_default: None) -> None:
    """The check can fail: the dense form keeps edges x path rows x channels."""
    recorder, edges = largest_tensor("dense", "qk")
    assert recorder.numbers >= edges * HEADS
