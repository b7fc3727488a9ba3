"""Invariants of spherical tensors in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def invariants_reference(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r""":math:`s_{lg} = \sum_m ((W_l h_{lm})_g + \delta_{l0} b_g) (W'_l h_{lm})_g` (SPEC section 6.2).

    h: [N, (L+1)^2, C]. weight: [L+1, 2 G, C], W_l above W'_l. bias: [G]. Returns [N, L+1, G].
    """
    degrees, width = weight.shape[0], bias.shape[0]
    parts = []
    for degree in range(degrees):
        rows = h[:, degree * degree : (degree + 1) ** 2]
        first, second = torch.matmul(rows, weight[degree].t()).split(width, -1)
        if degree == 0:
            first = first + bias
        parts.append((first * second).sum(1))
    return torch.stack(parts, 1)
