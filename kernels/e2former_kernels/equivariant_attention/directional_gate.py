r"""Gate and head of the scores ``qk_dot`` and ``qk_dot_scalar`` on a run of receivers, and their gradients.

Radial networks, harmonics and the receiver's rows make the input of the gate's linear layers, whose products are
cuBLAS's.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

from e2former_kernels.common.plan import EdgeChunk
from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.common.radial_kernel import RadialNetwork, norm_launch, second_backward_kernel, second_kernel
from e2former_kernels.common.tiles import next_power
from e2former_kernels.equivariant_attention import directional_kernel as kernel
from e2former_kernels.equivariant_attention.fused import Edges
from e2former_kernels.equivariant_attention.reference import DotWeights
from e2former_kernels.equivariant_attention.spec import AttentionSpec

TILE = (128, 1024)  # columns of one program of the kernels, at most, and numbers of one of its warps: 32 a thread


@functools.lru_cache(maxsize=8)
def harmonic_scales(lmax: int, unit: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Factor of each degree and order, [lmax+1, lmax+1]: "component" normalisation, or "integral" with ``unit``."""
    table = torch.zeros(lmax + 1, lmax + 1, dtype=torch.float64)
    for l in range(lmax + 1):
        for m in range(l + 1):
            square = (2 * l + 1) * math.factorial(l - m) / math.factorial(l + m) * (1 if m == 0 else 2)
            table[l, m] = math.sqrt(square / (4 * math.pi) if unit else square)
    with torch.inference_mode(False):
        return table.to(device, dtype)


class Kept(NamedTuple):
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
        return (triton.cdiv(edges, 128),), {"E": edges, "L": self.spec.lmax, "UNIT": self.unit, "BLOCK": 128}

    def _launch(
        self, receivers: int, dot: Tensor, tile: tuple[int, int] | None = None
    ) -> tuple[tuple[int, int], dict, int]:
        """Grid and constants of the kernels on receivers, and the blocks of columns of a degree.

        tile: columns of one program, at most, and numbers of one warp.
        """
        rows, width = dot.shape[1:]
        columns, numbers = tile or TILE
        block, padded = min(next_power(width), columns), next_power(2 * self.spec.lmax + 1)
        blocks = triton.cdiv(width, block)
        constants = {
            "M": rows, "D": width, "K": self.columns, "BM": padded, "BK": block,
            "num_warps": min(max(padded * block // numbers, 1), 8),
        }  # fmt: skip
        return (receivers, (self.spec.lmax + 1) * blocks), constants, blocks

    def _scales(self, like: Tensor) -> Tensor:
        return harmonic_scales(self.spec.lmax, self.unit, like.dtype, like.device)

    def _last_layers(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight and bias of the last layer of the head and, behind it in the same network, of the factor."""
        weight, bias, heads = self.network.weights.out[0], self.network.weights.out_bias[0], self.spec.num_heads
        return (weight[:heads], bias[:heads]), (weight[heads:], bias[heads:])

    def forward(
        self, chunk: EdgeChunk, edges: Edges, elements: tuple[Tensor, Tensor], dot: Tensor
    ) -> tuple[Tensor, Kept]:
        """Features of a run, and what :meth:`backward` takes. dot: [n, M, D], of the run's receivers, contiguous."""
        number, heads, w = chunk.num_edges, self.spec.num_heads, self.weights
        features = edges.vec.new_empty(number, 2 * heads)
        harmonics = edges.vec.new_empty(number, dot.shape[1])
        hidden, middle = self.network.forward(edges.position, *elements)
        hidden = hidden.squeeze(1)
        (weight, bias), (factor_weight, factor_bias) = self._last_layers()
        torch.addmm(bias, hidden, weight.t(), out=features[:, heads:])
        factor_middle = scalar = None
        if self.factors is None:
            factor = torch.addmm(factor_bias, hidden, factor_weight.t())
        else:
            factor, factor_middle = self.factors.forward(edges.position, *elements)
            factor = factor.squeeze(1)
        x = torch.empty_like(factor)
        if number:
            grid, constants = self._harmonics_launch(number)
            kernel.harmonics_kernel[grid](edges.vec, self._scales(dot), harmonics, **constants)
            grid, constants, _ = self._launch(chunk.num_nodes, dot)
            kernel.directional_kernel[grid](harmonics, dot, factor, chunk.row_ptr, x, **constants)
        gate = features[:, :heads]
        if self.unit:
            torch.addmm(w.bias, x, w.weight.t(), out=gate)
        else:
            scalar = torch.mm(x, w.weight.t())
            if number:
                grid, constants = norm_launch(1, number, heads, True)
                second_kernel[grid](scalar, w.bias, w.norm_weight, w.norm_bias, x, EDGE_MAJOR=False, **constants)
            torch.addmm(w.out_bias, x, w.out.t(), out=gate)
        return features, Kept(harmonics, factor, middle, factor_middle, scalar)

    def backward(
        self,
        grad: Tensor,
        kept: Kept,
        chunk: EdgeChunk,
        edges: Edges,
        elements: tuple[Tensor, Tensor],
        dot: Tensor,
        grad_dot: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``sum(grad * features)`` by the distance [e] and, in parts, the harmonics [S, e, M].

        Fills grad_dot [n, M, D]. ``kept`` is used up.
        """
        number, heads, w = chunk.num_edges, self.spec.num_heads, self.weights
        by_gate, by_head = grad[:, :heads], grad[:, heads:]
        if not self.unit:
            by_gate = torch.mm(by_gate, w.out)
            if number:
                grid, constants = norm_launch(1, number, heads, True)
                second_backward_kernel[grid](
                    by_gate, kept.scalar, w.bias, w.norm_weight, w.norm_bias, by_gate, EDGE_MAJOR=False, **constants
                )
        by_factor = torch.mm(by_gate, w.weight)
        grid, constants, blocks = self._launch(chunk.num_nodes, dot)
        by_harmonics = grad.new_empty(blocks, number, dot.shape[1])
        if chunk.num_nodes:
            kernel.directional_backward_kernel[grid](
                by_factor, kept.harmonics, dot, kept.factor, chunk.row_ptr, by_factor, by_harmonics, grad_dot, number,
                **constants,
            )  # fmt: skip
        (weight, _), (factor_weight, _) = self._last_layers()
        by_hidden = torch.mm(by_head, weight)
        by_distance = None
        if self.factors is None:
            by_hidden.addmm_(by_factor, factor_weight)
        else:
            by_distance = self.factors.backward(by_factor, kept.factor_middle, edges.position, *elements)
        more = self.network.backward(by_hidden.unsqueeze(1), kept.middle, edges.position, *elements)
        return more if by_distance is None else more.add_(by_distance), by_harmonics

    def add_by_vec(self, by_harmonics: Tensor, vec: Tensor, grad_vec: Tensor) -> None:
        """grad_vec [e, 3] += gradient through the harmonics."""
        if vec.shape[0]:
            grid, constants = self._harmonics_launch(vec.shape[0])
            kernel.harmonics_backward_kernel[grid](
                by_harmonics, vec, self._scales(vec), grad_vec, S=by_harmonics.shape[0], **constants
            )
