"""Gate and head of the directional scores on a chunk of receivers, with their gradients, and with tangents (``_dot``).

docs/network.md, section 6.2. The input of the gate's linear layers comes from radial networks, harmonics and the
receiver's rows; the products are cuBLAS's. Score ``qk`` has gate and head from a radial network alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.chunks import EdgeChunk
from e2former_kernels.common.harmonics import harmonic_scales
from e2former_kernels.common.tiles import next_power
from e2former_kernels.equivariant_attention import kernels_directional as kernel
from e2former_kernels.equivariant_attention.reference import AttentionSpec
from e2former_kernels.equivariant_attention.score import SCORES, DotWeights
from e2former_kernels.radial import kernels as layers
from e2former_kernels.radial.network import (
    ALONE_NUMBERS,
    MAX_PROGRAMS,
    TILE_NUMBERS,
    Kept,
    RadialFeatures,
    RadialNetwork,
    add_gradients,
)
from e2former_kernels.radial.reference import RadialWeights

# Columns of one program of the kernels, at most, and numbers of one of its warps: 32 a thread; with tangents 16 a
# thread in each of their three tiles.
TILE = (128, 1024)
PAIR_TILE = (64, 512)


class GateKept(NamedTuple):
    """What the reverse pass of a chunk takes over; T values, then changes, of everything on edges.

    The last three, for gradients by weights, are None where nothing is kept for them.
    """

    chunk: EdgeChunk
    vec: Tensor  # [e, 3]
    vec_dot: Tensor | None
    network: Kept
    factors: Kept | None
    factor: Tensor  # [T e, K], the radial factor R
    harmonics: Tensor  # [T, e, M]
    scalar: Tensor | None  # [T e, H], products of the first linear layer of ``qk_dot_scalar``
    hidden: Tensor | None  # [T e, h], results of the head's network without its last layer
    x: Tensor | None  # [T e, K], z R
    activated: Tensor | None  # [T e, H], SiLU(LN(scalar + b1)) of ``qk_dot_scalar``


def _linear(x: Tensor, weight: Tensor, bias: Tensor, edges: int, out: Tensor) -> None:
    """out [T e, O] = W x, with the bias in the first e rows, the values."""
    torch.addmm(bias, x[:edges], weight.t(), out=out[:edges])
    if x.shape[0] > edges:
        torch.mm(x[edges:], weight.t(), out=out[edges:])


class GateNetworks(NamedTuple):
    """Radial networks of the head, without its last layer, and of the factor, where it has its own."""

    head: RadialNetwork
    factor: RadialNetwork | None

    @classmethod
    def of(cls, radial: RadialWeights, weights: DotWeights, cutoff: float) -> GateNetworks:
        """The networks of these weights."""
        factor = None if weights.radial is None else RadialNetwork(weights.radial, cutoff)
        return cls(RadialNetwork(radial, cutoff, last=False), factor)


class DirectionalFeatures(RadialFeatures):
    """Gate and head of ``qk_dot`` and ``qk_dot_scalar``.

    ``qk_dot``: g = W (z * R) + b, with a network for the K = (lmax+1) D factors R and one for the head.
    ``qk_dot_scalar``: g = W2 SiLU(LN(W1 (z * R) + b1)) + b2, with one network for both.

    dot, dot_dot: [N, M, D], the receivers' projection and its change. The gradient by dot is made for all receivers.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        networks: GateNetworks,
        weights: DotWeights,
        dot: Tensor,
        dot_dot: Tensor | None = None,
    ) -> None:
        super().__init__(networks.head)
        self.spec, self.unit, self.factors = spec, SCORES[spec.score].unit, networks.factor
        self.weights = DotWeights(None, *(None if t is None else t.detach().contiguous() for t in weights[1:]))
        self.columns = self.weights.weight.shape[1]
        self.dot, self.dot_dot = dot.contiguous(), dot_dot
        self.by_dot: Tensor | None = None

    def _on_edges(self, edges: int) -> tuple[tuple[int], dict]:
        """Grid and constants of the harmonics' kernels."""
        return (math.ceil(edges / 128),), {"E": edges, "L": self.spec.lmax, "UNIT": self.unit, "BLOCK": 128}

    def _on_receivers(self, tangent: bool, chunk: EdgeChunk) -> tuple[list[Tensor], tuple[int, int], dict, int]:
        """Rows of the receivers, grid and constants of the contraction's kernels, blocks of columns of a degree."""
        rows, width = self.dot.shape[1:]
        columns, numbers = PAIR_TILE if tangent else TILE
        block, padded = min(next_power(width), columns), next_power(2 * self.spec.lmax + 1)
        blocks = math.ceil(width / block)
        constants = {
            "M": rows, "D": width, "K": self.columns, "BM": padded, "BK": block,
            "TANGENT": tangent, "num_warps": min(max(padded * block // numbers, 1), 8),
        }  # fmt: skip
        dots = [x[chunk.nodes] for x in (self.dot, self.dot_dot if tangent else self.dot)]
        return dots, (chunk.num_nodes, (self.spec.lmax + 1) * blocks), constants, blocks

    def _scales(self, like: Tensor) -> Tensor:
        divisor = math.sqrt(4 * math.pi) if self.unit else 1.0
        return harmonic_scales(self.spec.lmax, divisor, like.dtype, like.device)

    def _on_layer(self, edges: int, tangent: bool, keep: bool, sums: bool) -> tuple[tuple[int, int], dict, int]:
        """Grid and constants of the kernels of SiLU(LN(x + b1)), and the tiles of one program."""
        tile, programs = TILE_NUMBERS if keep else ALONE_NUMBERS, MAX_PROGRAMS if sums else None
        flags = {"NORM": True, "TANGENT": tangent, "EDGE_MAJOR": False}
        return layers.row_launch(edges, 1, self.spec.num_heads, tile, programs, **flags)

    def _last_layers(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight and bias of the last layer of the head and, behind it in the same network, of the factor."""
        weight, bias, heads = self.network.weights.out[0], self.network.weights.out_bias[0], self.spec.num_heads
        return (weight[:heads], bias[:heads]), (weight[heads:], bias[heads:])

    def forward(
        self,
        chunk: EdgeChunk,
        vec: Tensor,
        distance: Tensor,
        vec_dot: Tensor | None = None,
        distance_dot: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, GateKept]:
        """Features [T, e, 1, 2H], gate and head, and what :meth:`backward` takes."""
        number, heads, w, tangent = chunk.num_edges, self.spec.num_heads, self.weights, vec_dot is not None
        parts = 2 if tangent else 1
        features = vec.new_empty(parts, number, 1, 2 * heads)
        gate, head = features.view(-1, 2 * heads).split(heads, 1)
        harmonics = vec.new_empty(parts, number, self.dot.shape[1])
        hidden, network = self.network.forward(distance, *chunk.elements, distance_dot, keep)
        hidden = hidden.view(parts * number, self.network.hidden)
        last, last_of_factor = self._last_layers()
        _linear(hidden, *last, number, head)
        factors = None
        if self.factors is None:
            factor = vec.new_empty(parts * number, self.columns)
            _linear(hidden, *last_of_factor, number, factor)
        else:
            factor, factors = self.factors.forward(distance, *chunk.elements, distance_dot, keep)
            factor = factor.view(parts * number, self.columns)
        x = torch.empty_like(factor)
        if number:
            grid, constants = self._on_edges(number)
            rows, on_receivers, columns, _ = self._on_receivers(tangent, chunk)
            scales = self._scales(vec)
            changed = vec_dot if tangent else vec
            kernel.harmonics_kernel[grid](vec, changed, scales, harmonics, TANGENT=tangent, **constants)
            kernel.directional_kernel[on_receivers](harmonics, *rows, factor, chunk.row_ptr, x, number, **columns)
        scalar = activated = None
        if self.unit:
            _linear(x, w.weight, w.bias, number, gate)
        else:
            scalar = torch.mm(x, w.weight.t())
            activated = torch.empty_like(scalar) if keep else x
            if number:
                grid, constants, _ = self._on_layer(number, tangent, keep, False)
                layers.layer_kernel[grid](scalar, w.bias, w.norm_weight, w.norm_bias, activated, **constants)
            _linear(activated, w.out, w.out_bias, number, gate)
        kept = GateKept(chunk, vec, vec_dot, network, factors, factor, harmonics, scalar, hidden, x, activated)
        return features, kept if keep else kept._replace(hidden=None, x=None, activated=None)

    def _through_scalar(self, by_gate: Tensor, kept: GateKept, weights: bool) -> tuple[Tensor, Tensor | None]:
        """Gradient by the products of the first linear layer, and sums [3, H]: by norm_weight, norm_bias and bias."""
        w, number, tangent = self.weights, kept.chunk.num_edges, kept.vec_dot is not None
        by_gate = torch.mm(by_gate, w.out)
        if not number:
            return by_gate, by_gate.new_zeros(3, self.spec.num_heads) if weights else None
        grid, constants, tiles = self._on_layer(number, tangent, kept.x is not None, weights)
        sums = by_gate.new_empty(grid[0], 3, self.spec.num_heads) if weights else by_gate
        layers.layer_reverse_kernel[grid](
            by_gate, kept.scalar, w.bias, w.norm_weight, w.norm_bias, by_gate, sums, tiles=tiles, SUMS=3,
            WEIGHTS=weights, **constants,
        )  # fmt: skip
        return by_gate, sums.sum(0) if weights else None

    def _through_rows(self, by_x: Tensor, kept: GateKept) -> Tensor:
        """Turns the gradient by x into that by the factor, fills that by dot; returns that by harmonics, in parts."""
        chunk, tangent = kept.chunk, kept.vec_dot is not None
        rows, grid, constants, blocks = self._on_receivers(tangent, chunk)
        by_harmonics = by_x.new_empty(blocks, *kept.harmonics.shape)
        if self.by_dot is None:
            self.by_dot = torch.empty_like(self.dot)
        if chunk.num_nodes:
            kernel.directional_backward_kernel[grid](
                by_x, kept.harmonics, *rows, kept.factor, chunk.row_ptr, by_x, by_harmonics, self.by_dot[chunk.nodes],
                chunk.num_edges, **constants,
            )  # fmt: skip
        return by_harmonics

    def backward(
        self, grad: Tensor, kept: GateKept, weights: bool, by_vec: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients by distance and distance_dot and, for :meth:`add_by_vec`, by harmonics. ``kept`` is used up."""
        number, heads, w = kept.chunk.num_edges, self.spec.num_heads, self.weights
        by_gate, by_head = grad.view(-1, 2 * heads).split(heads, 1)
        by_scalar, norm_sums = (by_gate, None) if self.unit else self._through_scalar(by_gate, kept, weights)
        by_factor = torch.mm(by_scalar, w.weight)
        by_weight = torch.mm(by_scalar.t(), kept.x) if weights else None
        by_harmonics = self._through_rows(by_factor, kept)
        if not weights and not by_vec:
            return None, None, None
        (last, _), (last_of_factor, _) = self._last_layers()
        by_hidden = torch.mm(by_head, last)
        by_distance, by_factors = [], None
        if self.factors is None:
            by_hidden.addmm_(by_factor, last_of_factor)
        else:
            by_factor = by_factor.view(*grad.shape[:3], self.columns)
            *by_distance, by_factors = self.factors.backward(by_factor, kept.factors, weights, by_vec)
        by_out = self._by_last_layers(by_head, by_factor, kept.hidden) if weights else None
        by_hidden = by_hidden.view(*grad.shape[:3], self.network.hidden)
        *found, by_radial = self.network.backward(by_hidden, kept.network, weights, by_vec)
        for a, b in zip(found, by_distance, strict=False):
            if a is not None:
                a += b
        if weights:
            biases = grad[0].view(number, 2 * heads).sum(0)
            by_bias, by_out_bias = biases[:heads], biases[heads:].unsqueeze(0)
            if self.unit:
                rest = [by_weight, by_bias]
            else:
                by_out_bias = torch.cat([by_out_bias, by_factor[:number].sum(0, keepdim=True)], 1)
                by_gamma, by_beta, by_bias1 = norm_sums
                rest = [by_weight, by_bias1, by_gamma, by_beta, torch.mm(by_gate.t(), kept.activated), by_bias]
            by_radial = by_radial._replace(out=by_out, out_bias=by_out_bias)
            self.weights_found = add_gradients(self.weights_found, (*by_radial, *(by_factors or ()), *rest))
        return *found, by_harmonics

    def _by_last_layers(self, by_head: Tensor, by_factor: Tensor, hidden: Tensor) -> Tensor:
        """Gradient [1, H or 2H, h] by the last layer of the head and, in the same network, of the factor."""
        if self.unit:
            return torch.mm(by_head.t(), hidden).unsqueeze(0)
        out = hidden.new_empty(1, 2 * self.spec.num_heads, hidden.shape[1])
        for part, by_part in zip(out[0].chunk(2), (by_head, by_factor), strict=True):
            torch.mm(by_part.t(), hidden, out=part)
        return out

    def add_by_vec(self, by_harmonics: Tensor, kept: GateKept, out: Tensor) -> None:
        """out [e, 3] += gradient by vec through the harmonics."""
        vec, vec_dot = kept.vec, kept.vec_dot
        if not vec.shape[0]:
            return
        grid, constants = self._on_edges(vec.shape[0])
        backward, given = kernel.harmonics_backward_kernel, (vec,)
        if vec_dot is not None:
            backward, given = kernel.harmonics_second_kernel, (vec, vec_dot)
        backward[grid](by_harmonics, *given, self._scales(vec), out, S=by_harmonics.shape[0], **constants)

    def found(self) -> list[Tensor]:
        """Gradients by the tensors behind the value: by dot, and by the weights where they were asked for."""
        return [self.by_dot, *super().found()]
