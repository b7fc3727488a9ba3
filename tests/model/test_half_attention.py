"""The block's attention as one function of float16 rows, for frozen weights where TF32 is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.nn import block
from e2former_kernels.common.chunks import EdgeList

ATOMS = 6
ROUNDING = 2.0**-11
SHAPE = {"sphere_channels": 8, "num_layers": 2, "num_heads": 4, "head_dim": 4, "num_radial_basis": 8}


#: The interpreter takes seconds for the small one.
ON_GPU = {"sphere_channels": 128, "num_layers": 2, "num_heads": 32, "head_dim": 8, "num_radial_basis": 64}


@pytest.fixture(autouse=True)
def tf32(matmul_precision: Callable[[str], None]) -> None:
    matmul_precision("high")


@pytest.fixture
def calls(spy: Callable) -> list:
    """One entry for every block that ran as one function."""
    return spy(block, "half_attention")


class Case:
    """A network of random weights on six atoms, the last of them alone."""

    def __init__(
        self, device: str, dtype: torch.dtype = torch.float32, trained: bool = False, wide: bool = False, **config
    ) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        config = {"lmax": 1, "max_num_elements": 10, "kernel_backend": "triton", "cuda_graph": False} | config
        self.model = E2FormerV2(E2FormerV2Config(**(ON_GPU if wide else SHAPE) | config)).to(device, dtype)
        if not trained:
            self.model.freeze()
        torch.set_default_dtype(torch.float32)
        generator = torch.Generator().manual_seed(1)
        pos = 4 * torch.rand(ATOMS, 3, dtype=torch.float64, generator=generator)
        pos[-1] += 50.0
        self.pos = pos.to(device, dtype).requires_grad_()

        self.numbers = torch.tensor([1, 6, 8, 1, 1, 8], device=device)
        self.zeros = torch.zeros_like(self.numbers)

    def graph(self) -> Graph:
        on = self.pos.device
        cell, pbc = torch.eye(3).to(self.pos).unsqueeze(0), torch.zeros(1, 3, dtype=torch.bool, device=on)
        return build_graph(self.pos, cell, pbc, self.zeros, torch.tensor([ATOMS], device=on), 6.0)

    def features(self) -> torch.Tensor:
        one = self.zeros[:1]
        return self.model(self.numbers, one, one, self.zeros, self.pos, self.graph())

    def slope(self, create_graph: bool = False) -> torch.Tensor:
        x = self.features()
        (found,) = torch.autograd.grad(x[:, 0].sum() + x.square().sum(), self.pos, create_graph=create_graph)
        return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "config",
    [{"attention_norm": "molfm_v2"}, {"attention_norm": "softplus"}, {"lmax": 2, "value_multiplicity": 3}],
    ids=["molfm", "softplus", "wider"],
)
def test_errors_are_roundings(config: dict, device: str, calls: list) -> None:
    """A few of float64; on a GPU, with more channels, at most twice what TF32 makes of the reference."""
    wide = device == "cuda"
    exact = Case(device, torch.float64, wide=wide, kernel_backend="reference", **config)
    expected = exact.features().detach(), exact.slope()
    case = Case(device, wide=wide, **config)
    for _ in range(2):  # the second evaluation has splines
        found = case.features().detach(), case.slope()
        errors = [*map(error, found, expected)]
        assert max(errors) < 8 * ROUNDING
    assert len(calls) == 2 * 2 * SHAPE["num_layers"]
    with torch.no_grad():
        assert torch.equal(case.features(), found[0])
    if wide:
        reference = Case(device, wide=wide, kernel_backend="reference", **config)
        budget = [*map(error, (reference.features().detach(), reference.slope()), expected)]
        assert all(e <= 2 * b for e, b in zip(errors, budget, strict=True)), (errors, budget)


def test_no_edges(device: str, calls: list) -> None:
    case, exact = Case(device), Case(device, torch.float64, kernel_backend="reference")
    for c in (case, exact):
        c.pos.data.mul_(100.0)
    x = case.features()
    assert error(x.detach(), exact.features().detach()) < 8 * ROUNDING
    (slope,) = torch.autograd.grad(x.sum(), case.pos)
    assert len(calls) == SHAPE["num_layers"] and not slope.any()


def test_several_runs(device: str) -> None:
    """A block's value and gradients with the edges in chunks of at most eight.

    On a GPU products of other numbers of rows may add in another order, before their results become float16.
    """
    case = Case(device)
    model, numbers, graph = case.model, case.numbers, case.graph()
    x = torch.randn(ATOMS, 4, SHAPE["sphere_channels"], device=device, requires_grad=True)
    system, weight = torch.randn_like(x[:, 0]), torch.randn_like(x)
    found = []
    for most in (None, 8):
        edges = EdgeList(graph.source, graph.target, graph.row_ptr, numbers, max_edges=most)
        assert most is None or len(edges.chunks_of(most)) > 2
        execution = model._choose(graph, numbers).on(model.config, graph, edges)
        y = block.half_attention(model.blocks[0], x, system, graph, execution)
        found.append([y, *torch.autograd.grad((weight * y).sum(), (x, graph.vec), retain_graph=True)])
    for once, again in zip(*found, strict=True):
        assert error(again, once.double()) < (ROUNDING if device == "cuda" else 1e-4)


def test_derivatives_beyond_the_first(device: str, calls: list) -> None:
    """Rows of a Hessian go through the operations; a second backward pass gives the same bits."""
    rows = []
    for case in (Case(device), Case(device, torch.float64, kernel_backend="reference")):
        (row,) = torch.autograd.grad(case.slope(create_graph=True)[2, 1], case.pos)
        rows.append(row.double())
    assert error(*rows) < 16 * ROUNDING
    assert len(calls) == SHAPE["num_layers"]
    case = Case(device)
    loss = case.features().square().sum()
    a, b = (torch.autograd.grad(loss, case.pos, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "config",
    [
        {"score": "qk_dot"},
        {"message_order": 0},
        {"convolution": "eaas"},
        {"activation_checkpointing": True},
        {"value_multiplicity": 1},
        {"trained": True},
    ],
    ids=lambda config: next(iter(config)),
)
def test_who_does_not_get_it(config: dict, device: str, calls: list) -> None:
    assert Case(device, num_layers=1, **config).slope().isfinite().all()
    assert not calls


def test_strict_float32_does_not_get_it(device: str, calls: list) -> None:
    torch.set_float32_matmul_precision("highest")
    Case(device).slope()
    assert not calls
