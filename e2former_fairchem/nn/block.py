"""One transformer block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.execution import Execution
from e2former_fairchem.nn.attention import EquivariantAttention
from e2former_fairchem.nn.feedforward import GatedFeedForward
from e2former_fairchem.nn.half_attention import half_attention, serves
from e2former_fairchem.nn.images import ImageNodes
from e2former_fairchem.nn.layer_norm import EquivariantRMSNorm
from e2former_kernels.common.envelope import Envelope

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph


class TransformerBlock(nn.Module):
    """x + Attn(N1(x) + s), then x + FFN(N2(x)) (docs/network.md, section 5)."""

    def __init__(self, config: E2FormerV2Config, order: int, envelope: Envelope | None = None) -> None:
        super().__init__()
        self.norm1 = EquivariantRMSNorm(config.lmax, config.sphere_channels)
        self.attention = EquivariantAttention(config, order, envelope)
        self.norm2 = EquivariantRMSNorm(config.lmax, config.sphere_channels)
        self.feedforward = GatedFeedForward(config.lmax, config.sphere_channels, config.power_spectrum)

    def forward(
        self,
        x: Tensor,
        system: Tensor,
        graph: Graph,
        execution: Execution,
        images: ImageNodes | None,
    ) -> Tensor:
        """x: [N, (lmax+1)^2, C]; system: charge and spin embedding of each atom's system, [N, C]."""
        if execution.half and serves(self, execution):
            x = half_attention(self, x, system, graph, execution)
        else:
            x = self.attend(system, graph, execution, images, x, graph.vec)
        return self.feedforward.of_norm(x, self.norm2, execution)

    def attend(
        self,
        system: Tensor,
        graph: Graph,
        execution: Execution,
        images: ImageNodes | None,
        x: Tensor,
        vec: Tensor,
    ) -> Tensor:
        """x + Attn(N1(x) + s). vec: the graph's edge vectors, [E, 3]."""
        h = self.norm1(x, system, execution=execution)
        recompute = None
        if execution.recompute_features:
            recompute = partial(self.norm1, x.detach(), system.detach(), execution=execution)
        graph = graph if vec is graph.vec else graph.with_vec(vec)
        return x + self.attention(h, graph, execution, images, recompute)
