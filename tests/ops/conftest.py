"""Inputs of the operations at toy sizes: float64, an atom without neighbours, weights that are not symmetric."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # before triton is first imported, which is when this file is read
    os.environ.setdefault("TRITON_INTERPRET", "1")

from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.equivariant_attention import AttentionSpec, DotWeights

ELEMENTS = 4
PATHS = {1: 4, 2: 9, 3: 16, 4: 25}  # rows of a made-up coupling: the kernels know nothing of its structure


@pytest.fixture(autouse=True)
def poison_uninitialised() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@dataclass
class Make:
    """Random tensors of one dtype on one device."""

    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64) * scale
        return x.to(self.device, self.dtype).requires_grad_()

    def radial(self, groups: int, outputs: int, hidden: int, basis: int, norms: bool = True) -> RadialWeights:
        """Weights of ``groups`` radial networks."""
        norm = [self(groups, hidden, scale=0.5) if norms else None for _ in range(4)]
        return RadialWeights(
            self(groups, hidden, basis, scale=0.5),
            self(ELEMENTS, groups, hidden, scale=0.5),
            self(ELEMENTS, groups, hidden, scale=0.5),
            norm[0],
            norm[1],
            self(groups, hidden, hidden, scale=0.5),
            self(groups, hidden, scale=0.5),
            norm[2],
            norm[3],
            self(groups, outputs, hidden, scale=0.5),
            self(groups, outputs, scale=0.5),
        )

    def edges(self, nodes: int, edges: int) -> tuple[Tensor, ...]:
        """vec, source, target, row_ptr, species; atom 1 (if there is one) receives nothing."""
        target = torch.randint(0, nodes, (edges,))
        target = torch.where(target == 1, torch.zeros_like(target), target).sort().values.to(self.device)
        source = torch.randint(0, nodes, (edges,)).to(self.device)
        row_ptr = torch.searchsorted(target, torch.arange(nodes + 1, device=self.device))
        species = torch.randint(0, ELEMENTS, (nodes,)).to(self.device)
        return self(edges, 3), source, target, row_ptr, species

    def attention(
        self,
        score: str = "qk",
        norm: str = "smooth",
        order: int = 1,
        lmax: int = 1,
        nodes: int = 4,
        edges: int = 7,
        heads: int = 3,
        width: int = 2,
        per_head: int = 2,
        basis: int = 5,
        hidden: int = 4,
        cutoff: float = 3.0,
        **options,
    ) -> tuple:
        """Positional arguments of ``equivariant_attention``."""
        spec = AttentionSpec(
            lmax=lmax, num_heads=heads, num_basis=basis, cutoff=cutoff, score=score, norm=norm, order=order, **options
        )
        rows = (lmax + 1) ** 2
        vec, source, target, row_ptr, species = self.edges(nodes, edges)
        dot = dot_weights = None
        if score == "qk_dot":
            dot = self(nodes, rows, basis)
            columns = (lmax + 1) * basis
            dot_weights = DotWeights(self.radial(1, columns, hidden, basis), self(heads, columns), self(heads))
        elif score == "qk_dot_scalar":
            dot = self(nodes, rows, heads // (lmax + 1) + 1)
            square = self(heads, heads), self(heads)
            dot_weights = DotWeights(None, *square, self(heads), self(heads), self(heads, heads), self(heads))
        outputs = heads if score == "qk_dot" else 2 * heads
        coupling = self(PATHS[lmax], 3, rows).detach() if order == 1 else None
        nodes_in = (self(nodes, heads, width), self(nodes, heads, width), self(nodes, rows, heads * per_head), dot)
        weights = (self.radial(1, outputs, hidden, basis), dot_weights, coupling)
        return (spec, *nodes_in, vec, source, target, row_ptr, species, *weights)


@pytest.fixture
def make() -> Make:
    """Float64 on the CPU: Triton's interpreter."""
    return Make()


def leaves(arguments: object) -> list[Tensor]:
    """All tensors that need gradients in nested arguments, in order."""
    if isinstance(arguments, Tensor):
        return [arguments] if arguments.requires_grad else []
    if isinstance(arguments, tuple | list):
        return [t for a in arguments for t in leaves(a)]
    return []


@pytest.fixture
def find_leaves() -> Callable[[object], list[Tensor]]:
    """:func:`leaves`, for test modules (which cannot import this file by name)."""
    return leaves


@pytest.fixture
def compare() -> Callable[..., None]:
    """Compare an operation with its reference: value, all gradients, one gradient alone, all second derivatives."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).detach()) if b.numel() else 0.0

    def run(op: Tensor, reference: Tensor, inputs: list[Tensor], tolerance: float = 1e-11) -> None:
        assert op.shape == reference.shape
        assert not op.isnan().any()
        assert relative(op, reference) < tolerance
        cotangent = torch.randn_like(op)
        for n in range(min(4, len(inputs))):  # one input alone takes the path for frozen weights
            (a,) = torch.autograd.grad(op, inputs[n : n + 1], cotangent, retain_graph=True)
            (b,) = torch.autograd.grad(reference, inputs[n : n + 1], cotangent, retain_graph=True)
            assert not a.isnan().any()
            assert relative(a, b) < tolerance, f"gradient of input {n} alone"
        first = torch.autograd.grad(op, inputs, cotangent, create_graph=True)
        expected = torch.autograd.grad(reference, inputs, cotangent, create_graph=True)
        for n, (a, b) in enumerate(zip(first, expected, strict=True)):
            assert relative(a, b) < tolerance, f"gradient of input {n}"
        weights = [torch.randn_like(g) for g in first]
        second, expected = (
            torch.autograd.grad(
                sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), inputs, materialize_grads=True
            )
            for grads in (first, expected)
        )
        for n, (a, b) in enumerate(zip(second, expected, strict=True)):
            assert relative(a, b) < tolerance, f"second derivative of input {n}"

    return run
