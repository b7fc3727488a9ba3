"""fairchem's HydraModel with the parameter groups of the authors' optimiser."""

from __future__ import annotations

import torch
from fairchem.core.models.base import HydraModel

__all__ = ["E2FormerV2HydraModel"]


class E2FormerV2HydraModel(HydraModel):
    """HydraModel that tells fairchem's trainer which parameters train without weight decay.

    fairchem looks for ``no_weight_decay`` on the model it trains, where HydraModel has none: with HydraModel itself
    every parameter decays. Keys and checkpoints are HydraModel's.
    """

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay (docs/network.md, section 15.2): full names, from this model.

        What the backbone and the heads name themselves, and of all others the one-dimensional ones, every bias and
        every embedding.
        """
        names = {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim <= 1 or "bias" in name.rsplit(".", 1)[-1] or "embedding" in name
        }
        parts = {"backbone": self.backbone, **{f"output_heads.{key}": head for key, head in self.output_heads.items()}}
        for prefix, module in parts.items():
            if hasattr(module, "no_weight_decay"):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names
