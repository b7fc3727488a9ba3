"""Parameters of the attention's directional scores, beside those of the radial network."""

from __future__ import annotations

from torch import Tensor, nn

from e2former_fairchem.config import ATTENTION_SPECIES_WIDTH, E2FormerV2Config
from e2former_fairchem.execution import REFERENCE, Execution
from e2former_fairchem.nn.linear import SO3Linear, kaiming_linear
from e2former_fairchem.nn.radial import RadialMLP
from e2former_kernels.equivariant_attention import DotWeights


class DirectionalGate(nn.Module):
    """Parameters of the ``qk_dot`` and ``qk_dot_scalar`` gates (docs/network.md, section 6.2)."""

    def __init__(self, config: E2FormerV2Config) -> None:
        super().__init__()
        lmax, heads = config.lmax, config.num_heads
        self.score = config.score
        if self.score == "qk_dot":
            width = config.num_radial_basis
            self.radial = RadialMLP(
                config.num_radial_basis, ATTENTION_SPECIES_WIDTH, config.hidden_radial_width, (lmax + 1) * width
            )
            # the authors initialise this map like their SO3 linears
            self.out = kaiming_linear((lmax + 1) * width, heads)
        elif self.score == "qk_dot_scalar":
            width = heads // (lmax + 1) + 1
            self.hidden = kaiming_linear(heads, heads)
            self.norm = nn.LayerNorm(heads)
            self.out = kaiming_linear(heads, heads)
        else:
            raise NotImplementedError(f"score: expected one with a gate here, got {self.score!r}")
        self.project = SO3Linear(lmax, config.sphere_channels, width)

    def forward(
        self, target_embedding: Tensor, source_embedding: Tensor, execution: Execution = REFERENCE
    ) -> DotWeights:
        if self.score == "qk_dot":
            radial = self.radial(target_embedding, source_embedding, execution)
            return DotWeights(radial, self.out.weight, self.out.bias)
        return DotWeights(
            None,
            self.hidden.weight,
            self.hidden.bias,
            self.norm.weight,
            self.norm.bias,
            self.out.weight,
            self.out.bias,
        )
