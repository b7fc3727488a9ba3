"""Equivariant root-mean-square norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

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
    repeats = torch.tensor([2 * l + 1 for l in range(degrees)], device=x.device)
    balance = torch.repeat_interleave(
        1.0 / (repeats.to(torch.float64) * degrees * channels), repeats, output_size=degrees**2
    ).to(x.dtype)
    centred = torch.cat([x[:, :1] - x[:, :1].mean(-1, keepdim=True), x[:, 1:]], 1)
    variance = (centred.square().sum(-1) @ balance).view(-1, 1, 1)
    bias = bias if shift is None else bias + shift
    gamma = torch.repeat_interleave(weight, repeats, 0, output_size=degrees**2)
    y = centred * torch.rsqrt(variance + NORM_EPS) * gamma
    return torch.cat([y[:, :1] + bias.unsqueeze(-2), y[:, 1:]], 1)
