r"""The attention with the scores ``qk_dot`` and ``qk_dot_scalar``, by fused kernels.

Gate and head come from ``directional_gate.py`` (frozen weights) and ``second_directional.py`` (gradients by weights,
second derivatives); they are then the features of score ``qk``'s kernels, and their gradients go back the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from e2former_kernels.common.plan import EdgeChunk
from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.equivariant_attention.directional_gate import GateNetwork, Kept
from e2former_kernels.equivariant_attention.fused import Edges, FusedAttention
from e2former_kernels.equivariant_attention.reference import DotWeights
from e2former_kernels.equivariant_attention.second_directional import GateGradients

_DOT = 4  # position of the receivers' projection among the tensors of the operation; the weights follow


@dataclass(frozen=True, kw_only=True)
class DirectionalAttention(FusedAttention):
    """The attention step of these scores; beside the value's tensors it has the receivers' projection.

    weights_of: the radial weights and those of the gate, from all tensors.
    """

    weights_of: Callable[[list[Tensor]], tuple[RadialWeights, DotWeights]]
    first_weight: ClassVar[int] = _DOT + 1

    def _make_network(self, tensors: list[Tensor]) -> GateNetwork:
        return GateNetwork(self.spec, *self.weights_of(tensors))

    def _features(
        self, network: GateNetwork, chunk: EdgeChunk, edges: Edges, tensors: list[Tensor]
    ) -> tuple[Tensor, Kept]:
        return network.forward(chunk, edges, self.edges.elements(chunk), tensors[_DOT][chunk.nodes].contiguous())

    def _by_features(
        self,
        network: GateNetwork,
        grad: Tensor,
        kept: Kept,
        chunk: EdgeChunk,
        edges: Edges,
        tensors: list[Tensor],
        beside: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        dot = tensors[_DOT]
        if _DOT not in beside:
            beside[_DOT] = dot.new_empty(dot.shape)
        arguments = chunk, edges, self.edges.elements(chunk), dot[chunk.nodes].contiguous(), beside[_DOT][chunk.nodes]
        return network.backward(grad, kept, *arguments)

    def _gate(self, tensors: list[Tensor], changes: Sequence[Tensor] = ()) -> GateGradients:
        return GateGradients(self.spec, *self.weights_of(tensors), tensors[_DOT], *changes)
