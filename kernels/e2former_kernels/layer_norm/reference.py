"""Equivariant root-mean-square norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.linear.reference import degree_of_row, scalar_row

NORM_EPS = 1e-5


def equivariant_rms_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
    r"""RMS norm in which every degree has the same weight (docs/network.md, equations 5.3 and 5.4).

    :math:`\tilde x_0 = x_0 - \overline{x_0}`,
    :math:`\sigma^2 = \frac1C \sum_{c,l,m} \tilde x_{lmc}^2 / ((2l+1)(L+1))`,
    :math:`y_{lmc} = \tilde x_{lmc} (\sigma^2+\epsilon)^{-1/2} \gamma_{lc} + \delta_{l0} (\beta_c + s_c)`.

    Args:
        x: [N, (L+1)^2, C].
        weight: gamma, [L+1, C].
        bias: beta, [C].
        shift: s, [N, C].

    Returns:
        y, of the shape of x.
    """
    degrees, channels = weight.shape
    degree, scalar = degree_of_row(degrees, x.device), scalar_row(x)
    balance = (1.0 / ((2 * degree + 1).double() * degrees * channels)).to(x.dtype)
    centred = x - x.mean(-1, keepdim=True) * scalar
    variance = (centred.square().sum(-1) @ balance).view(-1, 1, 1)
    bias = bias if shift is None else bias + shift
    y = centred * torch.rsqrt(variance + NORM_EPS) * weight.index_select(0, degree)
    return y + bias.unsqueeze(-2) * scalar
