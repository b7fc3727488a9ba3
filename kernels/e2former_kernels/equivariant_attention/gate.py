"""Gate and head of every score on a run of receivers, with their gradients, and with tangents (``_dot``).

Score ``qk`` has them from one radial network (:class:`RadialGate`). The others (docs/network.md, section 6.2) make
the input of the gate's linear layers from radial networks, harmonics and the receiver's rows; the products are
cuBLAS's. :class:`GateNetwork` is for weights that no gradient is asked for, :class:`GateGradients` for all else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.harmonics import harmonic_scales
from e2former_kernels.common.runs import EdgeRun
from e2former_kernels.common.tiles import next_power
from e2former_kernels.equivariant_attention import kernels_gate as kernel
from e2former_kernels.equivariant_attention.reference import DotWeights
from e2former_kernels.equivariant_attention.spec import AttentionSpec
from e2former_kernels.radial import kernels as layers
from e2former_kernels.radial.network import (
    MAX_PROGRAMS,
    TILE_NUMBERS,
    VALUE_ALONE,
    Kept,
    RadialGradients,
    RadialNetwork,
    add_gradients,
    norm_launch,
)
from e2former_kernels.radial.reference import LAYER_NORM_EPS, RadialWeights

if TYPE_CHECKING:
    from e2former_kernels.equivariant_attention.fused import Edges


class RadialGate:
    """Features [T, e, 1, 2H] of runs, gate and head, from one radial network. T = 2 with tangents, else 1.

    network: the same, where it is made already. weights_found: gradients by the weights there are, added up over runs;
    None as long as none were asked for.
    """

    def __init__(self, weights: RadialWeights, cutoff: float, network: RadialNetwork | None = None) -> None:
        self.network = RadialGradients(weights, cutoff, network=network)
        self.weights_found: tuple[Tensor | None, ...] | None = None

    def forward(
        self,
        run: EdgeRun,
        vec: Tensor,
        distance: Tensor,
        vec_dot: Tensor | None = None,
        distance_dot: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """Features, with their change along vec_dot where it is given, and what :meth:`backward` takes."""
        return self.network.forward(distance, *run.elements, distance_dot)

    def backward(
        self, grad: Tensor, kept: Kept, weights: bool, by_vec: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by distance, distance_dot and, for :meth:`add_by_vec`, what else knows of the vectors.

        grad: as the features. weights: whether gradients of the weights are wanted. by_vec: whether the rest is.
        """
        by_distance, by_distance_dot, more = self.network.backward(grad, kept, weights, by_vec)
        self.weights_found = add_gradients(self.weights_found, more)
        return by_distance, by_distance_dot, None

    def found(self) -> list[Tensor]:
        """Gradients by the tensors behind the value, in their order, of all runs."""
        return [t for t in self.weights_found or () if t is not None]


TILE = (128, 1024)  # columns of one program of the kernels, at most, and numbers of one of its warps: 32 a thread


class NetworkKept(NamedTuple):
    """What the gradient of a run takes over. scalar: products of the first linear layer, of ``qk_dot_scalar``."""

    harmonics: Tensor  # [e, M]
    factor: Tensor  # [e, K], the radial factor
    middle: Tensor  # of the head's network
    factor_middle: Tensor | None  # of the factor's network, where it is another
    scalar: Tensor | None


class GateNetwork:
    """Radial networks and gate with weights that no gradient is asked for, ready to be evaluated on runs of receivers.

    Features are [e, 2H], the gate and the head. ``qk_dot``: g = W (z * R) + b, with a network for the K = (lmax+1) D
    factors R and one for the head. ``qk_dot_scalar``: g = W2 SiLU(LN(W1 (z * R) + b1)) + b2, with one network for both.
    """

    radial_type: ClassVar[type] = RadialNetwork

    def __init__(self, spec: AttentionSpec, radial: RadialWeights, weights: DotWeights) -> None:
        self.spec, self.unit = spec, spec.score == "qk_dot"
        inner, *rest = weights
        self.weights = DotWeights(None, *(None if t is None else t.detach().contiguous() for t in rest))
        self.network = self.radial_type(radial, spec.cutoff, last=False)
        self.factors = None if inner is None else self.radial_type(inner, spec.cutoff)
        self.columns = self.weights.weight.shape[1]

    def _harmonics_launch(self, edges: int) -> tuple[tuple[int, int], dict]:
        return (math.ceil(edges / 128),), {"E": edges, "L": self.spec.lmax, "UNIT": self.unit, "BLOCK": 128}

    def _launch(
        self, receivers: int, dot: Tensor, tile: tuple[int, int] | None = None
    ) -> tuple[tuple[int, int], dict, int]:
        """Grid and constants of the kernels on receivers, and the blocks of columns of a degree.

        tile: columns of one program, at most, and numbers of one warp.
        """
        rows, width = dot.shape[1:]
        columns, numbers = tile or TILE
        block, padded = min(next_power(width), columns), next_power(2 * self.spec.lmax + 1)
        blocks = math.ceil(width / block)
        constants = {
            "M": rows, "D": width, "K": self.columns, "BM": padded, "BK": block,
            "num_warps": min(max(padded * block // numbers, 1), 8),
        }  # fmt: skip
        return (receivers, (self.spec.lmax + 1) * blocks), constants, blocks

    def _scales(self, like: Tensor) -> Tensor:
        divisor = math.sqrt(4 * math.pi) if self.unit else 1.0
        return harmonic_scales(self.spec.lmax, divisor, like.dtype, like.device)

    def _last_layers(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight and bias of the last layer of the head and, behind it in the same network, of the factor."""
        weight, bias, heads = self.network.weights.out[0], self.network.weights.out_bias[0], self.spec.num_heads
        return (weight[:heads], bias[:heads]), (weight[heads:], bias[heads:])

    def forward(self, run: EdgeRun, edges: Edges, dot: Tensor) -> tuple[Tensor, NetworkKept]:
        """Features of a run, and what :meth:`backward` takes. dot: [n, M, D], of the run's receivers, contiguous."""
        number, heads, w = run.num_edges, self.spec.num_heads, self.weights
        features = edges.vec.new_empty(number, 2 * heads)
        harmonics = edges.vec.new_empty(number, dot.shape[1])
        hidden, middle = self.network.forward(edges.position, *run.elements)
        hidden = hidden.squeeze(1)
        (weight, bias), (factor_weight, factor_bias) = self._last_layers()
        torch.addmm(bias, hidden, weight.t(), out=features[:, heads:])
        factor_middle = scalar = None
        if self.factors is None:
            factor = torch.addmm(factor_bias, hidden, factor_weight.t())
        else:
            factor, factor_middle = self.factors.forward(edges.position, *run.elements)
            factor = factor.squeeze(1)
        x = torch.empty_like(factor)
        if number:
            grid, constants = self._harmonics_launch(number)
            kernel.harmonics_kernel[grid](edges.vec, self._scales(dot), harmonics, **constants)
            grid, constants, _ = self._launch(run.num_nodes, dot)
            kernel.directional_kernel[grid](harmonics, dot, factor, run.row_ptr, x, **constants)
        gate = features[:, :heads]
        if self.unit:
            torch.addmm(w.bias, x, w.weight.t(), out=gate)
        else:
            scalar = torch.mm(x, w.weight.t())
            if number:
                grid, constants = norm_launch(1, number, heads, True)
                layers.layer_kernel[grid](
                    scalar, w.bias, w.norm_weight, w.norm_bias, x, EDGE_MAJOR=False, TANGENT=False, **constants
                )
            torch.addmm(w.out_bias, x, w.out.t(), out=gate)
        return features, NetworkKept(harmonics, factor, middle, factor_middle, scalar)

    def backward(
        self,
        grad: Tensor,
        kept: NetworkKept,
        run: EdgeRun,
        edges: Edges,
        dot: Tensor,
        grad_dot: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``sum(grad * features)`` by the distance [e] and, in parts, the harmonics [S, e, M].

        Fills grad_dot [n, M, D]. ``kept`` is used up.
        """
        number, heads, w = run.num_edges, self.spec.num_heads, self.weights
        by_gate, by_head = grad[:, :heads], grad[:, heads:]
        if not self.unit:
            by_gate = torch.mm(by_gate, w.out)
            if number:
                grid, constants = norm_launch(1, number, heads, True)
                layers.layer_reverse_kernel[grid](
                    by_gate, kept.scalar, w.bias, w.norm_weight, w.norm_bias, by_gate, by_gate, EDGE_MAJOR=False,
                    **VALUE_ALONE, **constants,
                )  # fmt: skip
        by_factor = torch.mm(by_gate, w.weight)
        grid, constants, blocks = self._launch(run.num_nodes, dot)
        by_harmonics = grad.new_empty(blocks, number, dot.shape[1])
        if run.num_nodes:
            kernel.directional_backward_kernel[grid](
                by_factor, kept.harmonics, dot, kept.factor, run.row_ptr, by_factor, by_harmonics, grad_dot, number,
                **constants,
            )  # fmt: skip
        (weight, _), (factor_weight, _) = self._last_layers()
        by_hidden = torch.mm(by_head, weight)
        by_distance = None
        if self.factors is None:
            by_hidden.addmm_(by_factor, factor_weight)
        else:
            by_distance = self.factors.backward(by_factor, kept.factor_middle, edges.position, *run.elements)
        more = self.network.backward(by_hidden.unsqueeze(1), kept.middle, edges.position, *run.elements)
        return more if by_distance is None else more.add_(by_distance), by_harmonics

    def add_by_vec(self, by_harmonics: Tensor, vec: Tensor, grad_vec: Tensor) -> None:
        """grad_vec [e, 3] += gradient through the harmonics."""
        if vec.shape[0]:
            grid, constants = self._harmonics_launch(vec.shape[0])
            kernel.harmonics_backward_kernel[grid](
                by_harmonics, vec, self._scales(vec), grad_vec, S=by_harmonics.shape[0], **constants
            )


# Columns of one program of the kernels with tangents, at most, and numbers of one warp of these: 16 a thread in each of
# their three tiles.
PAIR_TILE = (64, 512)


class GateKept(NamedTuple):
    """What the reverse pass of a run takes over; T values, then changes, of everything on edges."""

    run: EdgeRun
    vec: Tensor  # [e, 3]
    vec_dot: Tensor | None
    network: Kept
    hidden: Tensor  # [T e, h], results of the head's network without its last layer
    factors: Kept | None
    factor: Tensor  # [T e, K], the radial factor R
    harmonics: Tensor  # [T, e, M]
    x: Tensor  # [T e, K], z R
    scalar: Tensor | None  # [T e, H], products of the first linear layer of ``qk_dot_scalar``
    activated: Tensor | None  # [T e, H], SiLU(LN(scalar + b1))


def _linear(x: Tensor, weight: Tensor, bias: Tensor, edges: int, out: Tensor) -> None:
    """out [T e, O] = W x, with the bias in the first e rows, the values."""
    torch.addmm(bias, x[:edges], weight.t(), out=out[:edges])
    if x.shape[0] > edges:
        torch.mm(x[edges:], weight.t(), out=out[edges:])


class GateGradients(GateNetwork):
    """:class:`GateNetwork` with tangents and gradients by its weights. Methods as of :class:`gate.RadialGate`.

    dot, dot_dot: [N, M, D], the receivers' projection and its change. The gradient by dot is made for all receivers.
    """

    radial_type: ClassVar[type] = RadialGradients

    def __init__(
        self,
        spec: AttentionSpec,
        radial: RadialWeights,
        weights: DotWeights,
        dot: Tensor,
        dot_dot: Tensor | None = None,
    ) -> None:
        super().__init__(spec, radial, weights)
        self.dot, self.dot_dot = dot.contiguous(), dot_dot
        self.by_dot = torch.empty_like(self.dot)
        self.weights_found: tuple[Tensor | None, ...] | None = None

    def _norm_launch(self, edges: int, tangent: bool, sums: bool) -> tuple[tuple[int, int], dict, int]:
        """Grid and constants of the kernels of SiLU(LN(x + b1)), and the tiles of one program."""
        heads = self.spec.num_heads
        padded = next_power(heads)
        block = max(TILE_NUMBERS // padded, 1)
        steps = math.ceil(math.ceil(edges / block) / MAX_PROGRAMS) if sums else 1
        constants = {
            "E": edges, "G": 1, "H": heads, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": block, "NORM": True,
            "TANGENT": tangent, "EDGE_MAJOR": False, "num_warps": 4,
        }  # fmt: skip
        return (math.ceil(edges / (block * steps)), 1), constants, steps

    def _directional(self, tangent: bool, run: EdgeRun) -> tuple[list[Tensor], tuple[int, int], dict, int]:
        """Rows of the receivers, grid and constants of the contraction's kernels, and the blocks of their columns."""
        if tangent:
            launch = self._launch(run.num_nodes, self.dot, PAIR_TILE)
            return [self.dot[run.nodes], self.dot_dot[run.nodes]], *launch
        return [self.dot[run.nodes]], *self._launch(run.num_nodes, self.dot)

    def forward(
        self,
        run: EdgeRun,
        vec: Tensor,
        distance: Tensor,
        vec_dot: Tensor | None = None,
        distance_dot: Tensor | None = None,
    ) -> tuple[Tensor, GateKept]:
        """Features [T, e, 1, 2H], gate and head, and what :meth:`backward` takes."""
        number, heads, w, tangent = run.num_edges, self.spec.num_heads, self.weights, vec_dot is not None
        parts = 2 if tangent else 1
        features = vec.new_empty(parts, number, 1, 2 * heads)
        gate, head = features.view(-1, 2 * heads).split(heads, 1)
        harmonics = vec.new_empty(parts, number, self.dot.shape[1])
        hidden, network = self.network.forward(distance, *run.elements, distance_dot)
        hidden = hidden.view(parts * number, self.network.hidden)
        last, last_of_factor = self._last_layers()
        _linear(hidden, *last, number, head)
        factors = None
        if self.factors is None:
            factor = vec.new_empty(parts * number, self.columns)
            _linear(hidden, *last_of_factor, number, factor)
        else:
            factor, factors = self.factors.forward(distance, *run.elements, distance_dot)
            factor = factor.view(parts * number, self.columns)
        x = torch.empty_like(factor)
        if number:
            grid, constants = self._harmonics_launch(number)
            rows, on_receivers, columns, _ = self._directional(tangent, run)
            scales = self._scales(vec)
            if tangent:
                kernel.harmonics_pair_kernel[grid](vec, vec_dot, scales, harmonics, **constants)
                kernel.directional_pair_kernel[on_receivers](
                    harmonics, *rows, factor, run.row_ptr, x, number, **columns
                )
            else:
                kernel.harmonics_kernel[grid](vec, scales, harmonics, **constants)
                kernel.directional_kernel[on_receivers](harmonics, *rows, factor, run.row_ptr, x, **columns)
        scalar = activated = None
        if self.unit:
            _linear(x, w.weight, w.bias, number, gate)
        else:
            scalar = torch.mm(x, w.weight.t())
            activated = torch.empty_like(scalar)
            if number:
                grid, constants, _ = self._norm_launch(number, tangent, False)
                layers.layer_kernel[grid](scalar, w.bias, w.norm_weight, w.norm_bias, activated, **constants)
            _linear(activated, w.out, w.out_bias, number, gate)
        kept = (run, vec, vec_dot, network, hidden, factors, factor, harmonics, x, scalar, activated)
        return features, GateKept(*kept)

    def _through_scalar(self, by_gate: Tensor, kept: GateKept, weights: bool) -> tuple[Tensor, Tensor | None]:
        """Gradient by the products of the first linear layer, and sums [3, H]: by norm_weight, norm_bias and bias."""
        w, number, tangent = self.weights, kept.run.num_edges, kept.vec_dot is not None
        by_gate = torch.mm(by_gate, w.out)
        if not number:
            return by_gate, by_gate.new_zeros(3, self.spec.num_heads) if weights else None
        grid, constants, steps = self._norm_launch(number, tangent, weights)
        sums = by_gate.new_empty(grid[0], 3, self.spec.num_heads) if weights else by_gate
        layers.layer_reverse_kernel[grid](
            by_gate, kept.scalar, w.bias, w.norm_weight, w.norm_bias, by_gate, sums, steps=steps, SUMS=3,
            WEIGHTS=weights, **constants,
        )  # fmt: skip
        return by_gate, sums.sum(0) if weights else None

    def _through_rows(self, by_x: Tensor, kept: GateKept) -> Tensor:
        """Turns the gradient by x into that by the factor, fills that by dot; returns that by harmonics, in parts."""
        run, tangent = kept.run, kept.vec_dot is not None
        rows, grid, constants, blocks = self._directional(tangent, run)
        by_harmonics = by_x.new_empty(blocks, *kept.harmonics.shape)
        if run.num_nodes:
            backward = kernel.directional_second_kernel if tangent else kernel.directional_backward_kernel
            backward[grid](
                by_x, kept.harmonics, *rows, kept.factor, run.row_ptr, by_x, by_harmonics, self.by_dot[run.nodes],
                run.num_edges, **constants,
            )  # fmt: skip
        return by_harmonics

    def backward(
        self, grad: Tensor, kept: GateKept, weights: bool, by_vec: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients by distance and distance_dot and, for :meth:`add_by_vec`, by harmonics. ``kept`` is used up."""
        number, heads, w = kept.run.num_edges, self.spec.num_heads, self.weights
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
        if vec_dot is None:
            super().add_by_vec(by_harmonics, vec, out)
        elif vec.shape[0]:
            grid, constants = self._harmonics_launch(vec.shape[0])
            kernel.harmonics_second_kernel[grid](
                by_harmonics, vec, vec_dot, self._scales(vec), out, S=by_harmonics.shape[0], **constants
            )

    def found(self) -> list[Tensor]:
        """Gradients by the tensors behind the value: by dot, and by the weights where they were asked for."""
        return [self.by_dot, *(t for t in self.weights_found or () if t is not None)]
