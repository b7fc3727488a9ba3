"""Equivariant attention as a module: projections before it, output maps after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from e2former_fairchem.config import ATTENTION_SPECIES_WIDTH, E2FormerV2Config
from e2former_fairchem.execution import REFERENCE, Execution
from e2former_fairchem.nn.axis_aligned import eaas_constants
from e2former_fairchem.nn.directional_gate import DirectionalGate
from e2former_fairchem.nn.images import ImageNodes
from e2former_fairchem.nn.linear import SO3Linear
from e2former_fairchem.nn.query_key import QueryKey
from e2former_fairchem.nn.radial import RadialMLP, SpeciesEmbedding
from e2former_fairchem.so3 import make_paths
from e2former_kernels.common.backend import float32_products
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.eaas import EAASConstants, axis_aligned_contraction, axis_aligned_contraction_reference
from e2former_kernels.equivariant_attention import (
    AttentionSpec,
    equivariant_attention,
    equivariant_attention_reference,
)
from e2former_kernels.equivariant_attention.score import SCORES
from e2former_kernels.linear import grouped_linear, grouped_linear_reference
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph


def of_rows(rows: Tensor, weights: list[Tensor], execution: Execution, bias: Tensor | None = None) -> Tensor:
    """Maps of path rows [N, P, C] to the rows of each degree, [N, (lmax+1)^2, out]; weights: [out, paths * C] each."""
    given = rows.flatten(1), weights, [2 * l + 1 for l in range(len(weights))], bias
    y = grouped_linear(*given, execution.mode) if execution.kernels else grouped_linear_reference(*given)
    return y.unflatten(1, (len(weights) ** 2, -1))


class PathProjection(nn.Module):
    r"""Order-1 output: :math:`O_{l_3} = n_{l_3}^{-1/2} B_{l_3} [Q^{(l_1 \to l_3)}]_{l_1}`.

    docs/network.md, equation 6.21. Path rows come in (l3, m3, l1) order, so the paths of one output row already stand
    side by side.
    """

    def __init__(self, row_paths: tuple[int, ...], channels: int, out_channels: int) -> None:
        super().__init__()
        self.row_paths, self.channels = row_paths, channels
        self.weights = nn.ParameterList(
            torch.empty(out_channels, paths * channels).uniform_(-1, 1) * math.sqrt(6 / (paths * channels))
            for paths in row_paths
        )

    def scaled(self) -> list[Tensor]:
        """n^{-1/2} B of every degree, [out, paths * C]."""
        return [w / math.sqrt(paths) for paths, w in zip(self.row_paths, self.weights, strict=True)]

    def forward(self, rows: Tensor, execution: Execution = REFERENCE) -> Tensor:
        """rows: [N, P, C] -> [N, (lmax+1)^2, out]."""
        return of_rows(rows, execution.made(self, "scaled", self.scaled), execution)


class EquivariantAttention(nn.Module):
    """Attention over neighbours with messages of order 0, 1 or 2 (docs/network.md, section 6).

    order: of the messages. envelope: of the graph it runs on (the long-range blocks have their own).
    """

    def __init__(self, config: E2FormerV2Config, order: int, envelope: Envelope | None = None) -> None:
        super().__init__()
        lmax, channels, heads = config.lmax, config.sphere_channels, config.num_heads
        self.spec = AttentionSpec(
            lmax=lmax,
            num_heads=heads,
            num_basis=config.num_radial_basis,
            envelope=envelope or config.envelope,
            score=config.score,
            norm=config.norm,
            order=order,
            inverse_distance=config.inverse_distance,
        )
        self.source_embedding = SpeciesEmbedding(config.max_num_elements, ATTENTION_SPECIES_WIDTH)
        self.target_embedding = SpeciesEmbedding(config.max_num_elements, ATTENTION_SPECIES_WIDTH)
        outputs = SCORES[config.score].outputs * heads
        self.radial = RadialMLP(config.num_radial_basis, ATTENTION_SPECIES_WIDTH, config.hidden_radial_width, outputs)
        self.query_key = QueryKey(lmax, channels, heads, config.head_dim)
        self.value = SO3Linear(lmax, channels, channels)
        self.dot = DirectionalGate(config) if SCORES[config.score].directional else None
        if order == 0:
            self.coupling, self.paths, width = None, None, channels
        else:
            paths, dtype = make_paths(lmax, config.reflection_equivariant, order), torch.get_default_dtype()
            self.register_buffer("coupling", paths.coupling.to(dtype), persistent=False)
            width = heads * (config.value_multiplicity or channels // heads)
            self.paths = PathProjection(paths.row_paths, channels, width)
        if order == 1:
            constants = eaas_constants(paths)
            self.row_paths, self.lists = constants.row_paths, constants.lists
            self.num_recursions = len(constants.recursion)
            self.register_buffer("aligned_index", constants.aligned_index, persistent=False)
            self.register_buffer("aligned_value", constants.aligned_value.to(dtype), persistent=False)
            for n, matrix in enumerate(constants.recursion):
                self.register_buffer(f"recursion{n}", matrix.to(dtype), persistent=False)
        self.out = SO3Linear(lmax, width, channels)

    @property
    def constants(self) -> EAASConstants:
        """The axis-aligned frame's constants, in the module's dtype and on its device."""
        recursion = tuple(getattr(self, f"recursion{n}") for n in range(self.num_recursions))
        aligned = self.aligned_index, self.aligned_value
        return EAASConstants(self.coupling, *aligned, recursion, self.row_paths, self.lists)

    def radial_and_splines(self, execution: Execution) -> tuple[RadialWeights, RadialSplines | None]:
        """Weights of the radial network, and its splines where there are some."""
        radial = self.radial(self.target_embedding.weight, self.source_embedding.weight, execution)
        if execution.elements is None or self.dot is not None:  # directional gates have features that no splines give
            return radial, None
        return radial, execution.frozen.splines(self, execution.elements, radial, self.spec.envelope.cutoff)

    def forward(
        self,
        h: Tensor,
        graph: Graph,
        execution: Execution,
        images: ImageNodes | None,
        recompute_h: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """h: [N, (lmax+1)^2, C], normalised. images: for ``eaas``.

        recompute_h: gives h once more, so that the backward pass need not keep what is made of it.
        Returns [N, (lmax+1)^2, C].
        """
        radial, splines = self.radial_and_splines(execution)
        query, key = self.query_key(h, execution, recompute_h)
        key, value = graph.fetch(key, self.value(h, execution))
        factored = execution.node_factored and self.spec.order == 1
        edges, half = execution.edges, execution.half
        contract = axis_aligned_contraction if execution.kernels else axis_aligned_contraction_reference

        def sent(value: Tensor) -> Tensor:
            """Rows that edges add up: of an image itself, and of its product with its position."""
            value = images.of_images(value)
            return torch.cat([value, contract(value, images.image_position.to(value.dtype), self.constants)], 1)

        if factored:
            assert images is not None
            key, value, half = images.of_images(key), sent(value), False  # far images are large
            edges = edges if images.edges is None else images.edges
        dot = dot_weights = None
        if self.dot is not None:
            dot = self.dot.project(h, execution)
            dot_weights = self.dot(self.target_embedding.weight, self.source_embedding.weight, execution)
        form = execution.form if self.spec.order > 0 else "relative"
        arguments = (self.spec, query, key, value, dot, graph.vec, edges, radial, dot_weights, self.coupling)
        if execution.kernels and form != "dense":

            def recompute() -> Tensor:
                value = self.value(recompute_h(), execution)
                return sent(value) if factored else value

            rows = equivariant_attention(
                *arguments,
                form=form,
                splines=splines,
                half=half,
                mode=execution.mode,
                recompute_value=None if recompute_h is None else recompute,
            )
        else:
            rows = equivariant_attention_reference(
                *arguments, form=form, recompute=execution.recompute, geometry=execution.geometry
            )
        if factored:
            plain, contracted = rows.split([self.spec.num_rows, rows.shape[1] - self.spec.num_rows], 1)
            own = contract(plain, images.position.to(plain.dtype), self.constants)
            rows = own - contracted
        return self._output(rows, execution)

    @property
    def one_map(self) -> bool:
        """Whether path projection and the map behind it are less work for a node as one map."""
        if self.paths is None:
            return False
        channels, width = self.out.weight.shape[1:]
        numbers = self.coupling.shape[0] * self.paths.channels
        return numbers * channels < width * (numbers + self.spec.num_rows * channels)

    def behind_paths(self, precision: str) -> list[Tensor]:
        """That map for every degree, [C, paths * C]. precision: of products outside."""
        scaled = self.paths.scaled()
        with float32_products(precision):
            return [w @ b for w, b in zip(self.out.weight, scaled, strict=True)]

    def _output(self, rows: Tensor, execution: Execution) -> Tensor:
        """rows: [N, P or (lmax+1)^2, C] -> [N, (lmax+1)^2, C]."""
        if self.paths is None:
            return self.out(rows, execution)
        if not execution.kernels or not self.one_map or execution.mode.autocast is not None:
            return self.out(self.paths(rows, execution), execution)
        weights = execution.made(self, "behind paths", lambda: self.behind_paths(execution.mode.precision))
        return of_rows(rows, weights, execution, self.out.bias)
