"""Inputs and derivatives of one attention layer of the paper's network, for whoever computes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from floor import Shape
from torch import Tensor
from workload import TINY, Network, System

from e2former_kernels.common.backend import Mode
from e2former_kernels.equivariant_attention import DotWeights, equivariant_attention, equivariant_attention_reference
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines, build_splines


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().requires_grad_()


class AttentionCase:
    """The layer's inputs as leaves, and the passes that are timed.

    features: query, key, value, edge vectors, and the receiver's projection where the score has one: what a network
    differentiates forces through. weights: of the radial networks and the directional gate.
    """

    def __init__(self, atoms: int, score: str, device: str, tiny: bool = False) -> None:
        trunk = Network(score=score, **{"num_layers": 1} | (TINY if tiny else {})).to(device).trunk
        layer = trunk.blocks[0].attention
        self.system = System(atoms, 32, device)
        self.spec, self.coupling = layer.spec, layer.coupling
        n, heads, rows = self.system.atoms, layer.spec.num_heads, layer.spec.num_rows
        self.channels, self.width = trunk.config.sphere_channels, trunk.config.head_dim
        torch.manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).requires_grad_()

        self.query, self.key = random(n, heads, self.width), random(n, heads, self.width)
        self.value = random(n, rows, self.channels)
        self.vec = _leaf(self.system.graph(self.system.pos).vec)
        self.dot = None
        embeddings = layer.target_embedding.weight, layer.source_embedding.weight
        self.radial = RadialWeights(*(_leaf(t) for t in layer.radial(*embeddings)))
        self.dot_weights = None
        if layer.dot is not None:
            weights = layer.dot(*embeddings)
            inner = None if weights.radial is None else RadialWeights(*(_leaf(t) for t in weights.radial))
            self.dot_weights = DotWeights(inner, *(_leaf(t) for t in weights[1:]))
            self.dot = _leaf(layer.dot.project(torch.randn(n, rows, self.channels, device=device)))
        self._collect()
        self.cotangents = [torch.randn_like(t) for t in self.features]
        self.grad = torch.randn(n, self.coupling.shape[0], self.channels, device=device)

    def to_double(self) -> AttentionCase:
        """The same numbers in float64, for the reference."""

        def double(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_()

        self.query, self.key, self.value, self.vec, self.dot = map(
            double, (self.query, self.key, self.value, self.vec, self.dot)
        )
        self.radial = RadialWeights(*map(double, self.radial))
        if self.dot_weights is not None:
            inner = self.dot_weights.radial
            inner = None if inner is None else RadialWeights(*map(double, inner))
            self.dot_weights = DotWeights(inner, *map(double, self.dot_weights[1:]))
        self.coupling, self.grad = self.coupling.double(), self.grad.double()
        self.cotangents = [c.double() for c in self.cotangents]
        self._collect()
        return self

    def _collect(self) -> None:
        features = (self.query, self.key, self.value, self.vec, self.dot)
        self.features = [t for t in features if t is not None]
        gate = () if self.dot_weights is None else (*(self.dot_weights.radial or ()), *self.dot_weights[1:])
        self.weights = [t for t in (*self.radial, *gate) if t is not None]

    @property
    def shape(self) -> Shape:
        """Widths, for :mod:`floor`."""
        hidden, basis = self.radial.basis.shape[1:]
        nonzeros, paths = int((self.coupling.abs() > 1e-12).sum()), self.coupling.shape[0]
        widths = (self.spec.num_rows, self.channels, self.spec.num_heads, self.width)
        return Shape(*widths, paths, nonzeros, basis, hidden, self.radial.out.shape[1])

    def splines(self) -> RadialSplines | None:
        """Splines of the radial network, which inference with frozen weights takes; None where there are none."""
        if self.spec.score != "qk":
            return None
        return build_splines(self.radial, self.spec.envelope.cutoff, sorted(set(self.system.numbers.tolist())))

    def frozen(self, frozen: bool) -> None:
        for weight in self.weights:
            weight.requires_grad_(not frozen)

    def call(self, form: str, splines: RadialSplines | None = None) -> Tensor:
        """``triton``, or ``dense``: the edge-materialised PyTorch implementation."""
        s = self.system
        weights = self.radial, self.dot_weights, self.coupling
        arguments = (self.spec, self.query, self.key, self.value, self.dot, self.vec, s.edge_list(), *weights)
        if form == "triton":
            trained = any(w.requires_grad for w in self.weights)
            mode = Mode(trained, precision=torch.get_float32_matmul_precision())
            options = {"splines": splines, "half": not trained and mode.precision != "highest", "mode": mode}
            return equivariant_attention(*arguments, **options)
        return equivariant_attention_reference(*arguments, form="dense", recompute=False)

    def forward(self, form: str, splines: RadialSplines | None = None) -> Tensor:
        """Value, no graph."""
        with torch.no_grad():
            return self.call(form, splines)

    def forward_backward(self, form: str, splines: RadialSplines | None = None) -> list[Tensor]:
        """Value and its gradient by the features: what an evaluation of forces needs. Weights frozen."""
        return list(torch.autograd.grad(self.call(form, splines), self.features, self.grad))

    def second(self, form: str, splines: RadialSplines | None = None) -> list[Tensor]:
        """Training on forces: gradient by the features, and of a functional of it by features and weights."""
        first = torch.autograd.grad(self.call(form, splines), self.features, self.grad, create_graph=True)
        functional = sum((g * c).sum() for g, c in zip(first, self.cotangents, strict=True))
        inputs = [*self.features, *self.weights]
        return list(torch.autograd.grad(functional, inputs, allow_unused=True, materialize_grads=True))

    def passes(self) -> dict[str, Callable]:
        """By the names of :data:`floor.KINDS`."""
        return {"forward": self.forward, "forward_backward": self.forward_backward, "second": self.second}
