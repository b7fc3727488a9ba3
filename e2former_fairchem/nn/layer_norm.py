"""Equivariant root-mean-square norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2former_fairchem.execution import REFERENCE, Execution
from e2former_kernels.layer_norm import equivariant_rms_norm, equivariant_rms_norm_reference


class EquivariantRMSNorm(nn.Module):
    r"""RMS norm in which every degree has the same weight (docs/network.md, equations 5.3 and 5.4).

    :math:`\tilde x_0 = x_0 - \overline{x_0}`,
    :math:`\sigma^2 = \frac1C \sum_{c,l,m} \tilde x_{lmc}^2 / ((2l+1)(L+1))`,
    :math:`y_{lmc} = \tilde x_{lmc} (\sigma^2+\epsilon)^{-1/2} \gamma_{lc} + \delta_{l0} \beta_c`.
    """

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.affine_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, shift: Tensor | None = None, execution: Execution = REFERENCE) -> Tensor:
        """x: [N, (lmax+1)^2, C]; shift: [N, C], added to the scalar row of the result. Same shape as x."""
        if execution.kernels:
            return equivariant_rms_norm(x, self.affine_weight, self.affine_bias, shift, execution.mode)
        return equivariant_rms_norm_reference(x, self.affine_weight, self.affine_bias, shift)
