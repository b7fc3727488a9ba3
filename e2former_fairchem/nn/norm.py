"""Equivariant root-mean-square norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2former_fairchem.execution import REFERENCE, Execution
from e2former_fairchem.so3 import degree_of_row
from e2former_kernels.norm import equivariant_rms_norm

EPS = 1e-5


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
        degree = degree_of_row(lmax)
        balance = torch.tensor([1.0 / ((2 * l + 1) * (lmax + 1)) for l in degree], dtype=torch.float64)
        self.register_buffer("degree", torch.tensor(degree), persistent=False)
        # 1 for the scalar row: products with it, where slices would be copies in the backward
        scalar = (self.degree == 0).to(torch.get_default_dtype()).unsqueeze(-1)
        self.register_buffer("scalar", scalar, persistent=False)
        self.register_buffer("balance", (balance / channels).to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None, execution: Execution = REFERENCE) -> Tensor:
        """x: [N, (lmax+1)^2, C]; shift: [N, C], added to the scalar row of the result. Same shape as x."""
        if execution.backend == "triton":
            return equivariant_rms_norm(x, self.affine_weight, self.affine_bias, shift)
        centred = x - x.mean(-1, keepdim=True) * self.scalar
        variance = (centred.square().sum(-1) @ self.balance.to(x.dtype)).view(-1, 1, 1)
        bias = self.affine_bias if shift is None else self.affine_bias + shift
        y = centred * torch.rsqrt(variance + EPS) * self.affine_weight.index_select(0, self.degree)
        return y + bias.unsqueeze(-2) * self.scalar
