"""Radial networks as modules: parameters here, arithmetic in ``e2former_kernels.radial.reference``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from e2former_fairchem.execution import REFERENCE, Execution
from e2former_kernels.radial.reference import RadialWeights


class RadialMLP(nn.Module):
    """``groups`` networks Linear - LayerNorm - SiLU - Linear - LayerNorm - SiLU - Linear over [phi; T; S].

    num_basis: width of the distance basis. species_width: width of each of the two element embeddings.
    hidden, out_features: widths. layer_norm: False drops both norms (the authors' ``wolayernorm``).
    """

    def __init__(
        self,
        num_basis: int,
        species_width: int,
        hidden: int,
        out_features: int,
        groups: int = 1,
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_basis, self.species_width = num_basis, species_width
        in_features = num_basis + 2 * species_width
        self.weight0 = self._uniform(groups, hidden, in_features)
        self.bias0 = nn.Parameter(torch.zeros(groups, hidden))
        self.weight1 = self._uniform(groups, hidden, hidden)
        self.bias1 = nn.Parameter(torch.zeros(groups, hidden))
        self.weight2 = self._uniform(groups, out_features, hidden)
        self.bias2 = nn.Parameter(torch.zeros(groups, out_features))
        for name in ("norm0", "norm1"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(groups, hidden)) if layer_norm else None)
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(groups, hidden)) if layer_norm else None)

    @staticmethod
    def _uniform(groups: int, out_features: int, in_features: int) -> nn.Parameter:
        bound = math.sqrt(6 / in_features)
        return nn.Parameter(torch.empty(groups, out_features, in_features).uniform_(-bound, bound))

    def forward(
        self, target_embedding: Tensor, source_embedding: Tensor, execution: Execution = REFERENCE
    ) -> RadialWeights:
        """Fold the element embeddings [Z, species_width] into per-element rows of the first layer."""

        def fold() -> tuple[Tensor, Tensor, Tensor]:
            basis, target, source = self.weight0.split([self.num_basis, self.species_width, self.species_width], -1)
            with torch.autocast(basis.device.type, enabled=False):  # weights stay in one dtype, also under autocast
                folded_target = torch.einsum("zs,ghs->zgh", target_embedding, target) + self.bias0
                return basis, folded_target, torch.einsum("zs,ghs->zgh", source_embedding, source)

        return RadialWeights(
            *execution.made(self, "folded", fold),
            self.norm0_weight,
            self.norm0_bias,
            self.weight1,
            self.bias1,
            self.norm1_weight,
            self.norm1_bias,
            self.weight2,
            self.bias2,
        )


# The authors start every embedding within 0.001, which leaves elements, charges and spins indistinguishable for the
# first hundreds of steps. 0.1 (0.3 for the atoms' own) reached a quarter lower force error on the bundled sample.
EMBEDDING_SCALE = 0.1


class SpeciesEmbedding(nn.Embedding):
    """One row per atomic number 0..max_num_elements, uniform within ``scale``."""

    def __init__(self, max_num_elements: int, width: int, scale: float = EMBEDDING_SCALE) -> None:
        super().__init__(max_num_elements + 1, width)
        nn.init.uniform_(self.weight, -scale, scale)
