"""Value and first derivative of the attention with fused kernels, run by run, nothing kept between the two.

For score ``qk``. The second derivative and everything beyond goes through :mod:`e2former_kernels.common.chunked`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.plan import EdgeChunk
from e2former_kernels.common.radial import RadialWeights, gaussian_basis, radial_network
from e2former_kernels.common.radial_kernel import RadialNetwork
from e2former_kernels.common.tiles import next_power
from e2former_kernels.equivariant_attention import fused_kernel as kernel
from e2former_kernels.equivariant_attention.primitives import (
    launch_aggregate,
    launch_aggregate_transposed,
    launch_contract,
    launch_message_dot,
    launch_pair_sum,
)
from e2former_kernels.equivariant_attention.spec import AttentionSpec

BACKWARD_WARPS = 1  # of weights_backward_kernel
WEIGHTS_TILE = (64, 2)  # heads and warps of one program of weights_kernel
_NORM = {"smooth": 0, "molfm": 1, "softplus": 2, "sigmoid": 3}
# Positions of the inputs among the tensors of the operation: the weights of the radial network follow.
_VEC, _QUERY, _KEY, _VALUE, _RADIAL = range(5)


@dataclass
class _Edges:
    """Geometry of a run's edges, and which elements they join."""

    vec: Tensor
    distance: Tensor
    envelope: Tensor
    scale: Tensor
    target_species: Tensor
    source_species: Tensor


@dataclass(frozen=True)
class FusedAttention:
    """One attention step over its runs of receivers: everything but the tensors that may need gradients.

    directions: B of the kernels, 3 for the relative form of order 1, else 1. coupling: [P, 3 M] or None.
    radial: the structure of the radial weights (which of them are there). plan: the same function for
    :mod:`e2former_kernels.common.chunked`. cache: what the backward pass takes over from the forward pass.
    """

    spec: AttentionSpec
    directions: int
    chunks: list[EdgeChunk]
    source: Tensor
    species: Tensor
    coupling: Tensor | None
    radial: RadialWeights
    plan: Plan
    cache: dict = field(default_factory=dict, compare=False)

    def _weights(self, tensors: list[Tensor]) -> RadialWeights:
        rest = iter(tensors)
        return RadialWeights(*(None if t is None else next(rest) for t in self.radial))

    def _network(self, weights: list[Tensor]) -> RadialNetwork:
        """The radial network, the one of the forward pass where the weights are frozen."""
        if "network" in self.cache:
            return self.cache["network"]
        network = RadialNetwork(self._weights(weights), self.spec.cutoff)
        if not any(w.requires_grad for w in weights):
            self.cache["network"] = network
        return network

    def _geometry_arguments(self, edges: int) -> tuple[tuple[int, ...], dict]:
        spec = self.spec
        lower, upper = spec.bell if spec.bell is not None else (0.0, spec.cutoff)
        constants = {
            "E": edges, "lower": float(lower), "upper": float(upper), "P": spec.envelope_exponent,
            "BELL": spec.bell is not None, "V2": spec.inverse_distance == "v2", "ORDER": spec.order,
            "B": self.directions, "BLOCK": 256,
        }  # fmt: skip
        return (triton.cdiv(edges, 256),), constants

    def _edges(self, chunk: EdgeChunk, vec: Tensor) -> _Edges:
        vec = vec[chunk.edges].contiguous()
        edges = vec.shape[0]
        distance, envelope = vec.new_empty(edges), vec.new_empty(edges)
        scale = vec.new_empty(edges, self.directions)
        if edges:
            grid, constants = self._geometry_arguments(edges)
            kernel.geometry_kernel[grid](vec, distance, envelope, scale, **constants)
        target_species = self.species[chunk.nodes].index_select(0, chunk.target)
        source_species = self.species.index_select(0, self.source[chunk.edges])
        return _Edges(vec, distance, envelope, scale, target_species, source_species)

    def _attention(self, chunk: EdgeChunk, edges: _Edges, query: Tensor, key: Tensor, features: Tensor, keep: bool):
        """Weights [e, H]; with ``keep`` also <q, k>/sqrt(S) [e, H] and the softmax's shift and sum [n, H]."""
        heads, width = query.shape[1:]
        weight = features.new_empty(chunk.num_edges, heads)
        pair = torch.empty_like(weight) if keep else weight
        top = features.new_empty(chunk.num_nodes, heads) if keep else weight
        total = torch.empty_like(top) if keep else weight
        if weight.numel():
            block = min(next_power(heads), WEIGHTS_TILE[0])
            kernel.weights_kernel[chunk.num_nodes, triton.cdiv(heads, block)](
                query[chunk.nodes], key, features, edges.envelope, self.source[chunk.edges], chunk.row_ptr, pair,
                weight, top, total, heads, width, 1.0 / math.sqrt(width), self.spec.softmax_constant,
                NORM=_NORM[self.spec.norm], BH=block, BS=next_power(width), KEEP=keep, num_warps=WEIGHTS_TILE[1],
            )  # fmt: skip
        return weight, pair, top, total

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """vec [E, 3], query [N, H, S], key [N', H, S], value [N', M, C], radial weights -> [N, P or M, C]."""
        vec, query, key, value = tensors[:_RADIAL]
        query, key = query.contiguous(), key.contiguous()
        network = self._network(tensors[_RADIAL:])
        senders, rows, channels = value.shape
        heads = query.shape[1]
        per_head = value.view(senders, rows * channels // heads, heads)
        out_rows = rows if self.coupling is None else self.coupling.shape[0]
        out = value.new_empty(query.shape[0], out_rows, channels)
        for chunk in self.chunks:
            edges = self._edges(chunk, vec)
            features, _ = network.forward(edges.distance, edges.target_species, edges.source_species)
            weight, *_ = self._attention(chunk, edges, query, key, features, keep=False)
            if self.coupling is None:
                summed = out[chunk.nodes].view(chunk.num_nodes, 1, per_head.shape[1], heads)
            else:
                summed = value.new_empty(chunk.num_nodes, self.directions, per_head.shape[1], heads)
            launch_aggregate(weight, edges.scale, per_head, self.source[chunk.edges], chunk.row_ptr, summed)
            if self.coupling is not None:
                launch_contract(self.coupling, summed.view(chunk.num_nodes, -1, channels), out[chunk.nodes])
        return out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        """Gradients of the wanted inputs."""
        vec, query, key, value = tensors[:_RADIAL]
        grad, query, key = grad.contiguous(), query.contiguous(), key.contiguous()
        senders, _, channels = value.shape
        heads, width = query.shape[1:]
        rows = value.shape[1] * channels // heads
        per_head = value.view(senders, rows, heads)
        weights_wanted = [n - _RADIAL for n in wanted if n >= _RADIAL]
        network = None if weights_wanted else self._network(tensors[_RADIAL:])
        self.cache.clear()
        single = len(self.chunks) == 1
        fresh = torch.empty_like if single else torch.zeros_like
        grad_vec = torch.empty_like(vec) if _VEC in wanted else None
        grad_query = torch.empty_like(query) if _QUERY in wanted else None
        grad_key = fresh(key) if _KEY in wanted else None
        grad_value = fresh(value) if _VALUE in wanted else None
        grad_weights: list[Tensor | None] = [None] * len(weights_wanted)
        for chunk in self.chunks:
            edges = self._edges(chunk, vec)
            number, receivers = chunk.num_edges, chunk.num_nodes
            source = self.source[chunk.edges]
            graph = None
            if weights_wanted:
                features, graph = self._radial_graph(edges, tensors[_RADIAL:], weights_wanted)
            else:
                features, middle = network.forward(edges.distance, edges.target_species, edges.source_species)
            weight, pair, top, total = self._attention(chunk, edges, query, key, features, keep=True)
            part = grad[chunk.nodes]
            if self.coupling is not None:
                outer = part.new_empty(receivers, self.coupling.shape[1], channels)
                launch_contract(self.coupling.t().contiguous(), part, outer)
                part = outer
            part = part.view(receivers, self.directions, rows, heads)
            dots = weight.new_empty(number, self.directions, heads)
            launch_message_dot(per_head, part, source, chunk.row_ptr, dots)
            grad_features = torch.empty_like(features)
            grad_envelope, grad_scale = torch.empty_like(edges.envelope), torch.empty_like(edges.scale)
            if number:
                kernel.weights_backward_kernel[(receivers,)](
                    dots, weight, pair, features, edges.envelope, edges.scale, chunk.row_ptr, top, total,
                    grad_features, pair, grad_envelope, grad_scale, heads, 1.0 / math.sqrt(width),
                    self.spec.softmax_constant,
                    NORM=_NORM[self.spec.norm], B=self.directions, BH=next_power(heads), num_warps=BACKWARD_WARPS,
                )  # fmt: skip
            if grad_query is not None:
                launch_pair_sum(pair, key, source, None, chunk.row_ptr, grad_query[chunk.nodes])
            if grad_key is not None:
                launch_pair_sum(
                    pair, query[chunk.nodes], chunk.target, chunk.order, chunk.order_ptr, grad_key, chunk.senders
                )
            if grad_value is not None:
                launch_aggregate_transposed(
                    weight, edges.scale, part, chunk.target, chunk.order, chunk.order_ptr,
                    grad_value.view(senders, rows, heads), chunk.senders,
                )  # fmt: skip
            if graph is not None:
                grad_distance, *found = torch.autograd.grad(graph[0], graph[1:], grad_features)
                for n, g in enumerate(found):
                    grad_weights[n] = g if grad_weights[n] is None else grad_weights[n] + g
            elif grad_vec is not None:
                grad_distance = network.backward(
                    grad_features, middle, edges.distance, edges.target_species, edges.source_species
                )
            if grad_vec is not None and number:
                grid, constants = self._geometry_arguments(number)
                kernel.geometry_backward_kernel[grid](
                    edges.vec, grad_distance, grad_envelope, grad_scale, grad_vec[chunk.edges], **constants
                )
        found = [grad_vec, grad_query, grad_key, grad_value]
        found = {n: g for n, g in enumerate(found) if g is not None}
        found |= {n + _RADIAL: g for n, g in zip(weights_wanted, grad_weights, strict=True)}
        return [found[n] for n in wanted]

    def _radial_graph(self, edges: _Edges, weights: list[Tensor], wanted: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Radial features with a graph behind them, and [features, distance, wanted weights] of it."""
        with torch.enable_grad():
            distance = edges.distance.detach().requires_grad_()
            leaves = [w.detach().requires_grad_(n in wanted) for n, w in enumerate(weights)]
            features = radial_network(
                gaussian_basis(distance, self.spec.cutoff, self.spec.num_basis),
                edges.target_species,
                edges.source_species,
                self._weights(leaves),
            )
        return features.detach().contiguous(), [features, distance, *(leaves[n] for n in wanted)]
