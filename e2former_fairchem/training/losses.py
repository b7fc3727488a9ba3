"""Losses of the authors' releases that fairchem does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_fairchem.compat import LossWithReduction


class PerSystemSumLoss(LossWithReduction):
    r"""A loss over atoms, summed within each system and averaged over systems: :math:`\frac1B \sum_k \ell_k`.

    docs/network.md, equation 15.1.

    With fairchem's `L2NormLoss` this is the force loss of the authors' second stage (`l2mae`),
    :math:`\frac1B \sum_k \lVert F_k - F_k^{\rm ref} \rVert`. fairchem's reductions are the mean over atoms, the plain
    sum, and `per_structure`, which divides each system's sum by its atoms. B counts the systems of all ranks.

    Args:
        loss_fn: module that gives one value per atom, as fairchem's losses.
        coefficient: weight in the total loss.
    """

    def __init__(self, loss_fn: torch.nn.Module, coefficient: float = 1.0) -> None:
        super().__init__(loss_fn=loss_fn, reduction="sum", coefficient=coefficient)

    def reduce(self, loss: Tensor, natoms: Tensor) -> Tensor:
        """See the class."""
        return self.mean_over_ranks(natoms.numel(), loss.sum())
