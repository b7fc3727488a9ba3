"""Rows of a feature and their degrees, and the linear map of each degree in plain PyTorch.

Degree l takes rows l^2 .. (l+1)^2 - 1 (docs/network.md, section 1.3). Where some rows are meant, products with zeros
and ones stand here: slices would be copies in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def degree_of_row(degrees: int, device: torch.device) -> Tensor:
    """The degree of every row, [degrees^2] int64: 0, 1, 1, 1, 2, ..."""
    return torch.tensor([l for l in range(degrees) for _ in range(2 * l + 1)], device=device)


def scalar_row(x: Tensor) -> Tensor:
    """1 for the row of degree 0, else 0: [M, 1], for x [N, M, ...]."""
    return torch.tensor([1.0] + [0.0] * (x.shape[1] - 1), dtype=x.dtype, device=x.device).unsqueeze(-1)


def so3_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r""":math:`y_{l m o} = \sum_c W^l_{o c} x_{l m c} + \delta_{l 0} b_o` (docs/network.md, equation 5.1).

    Args:
        x: [N, (L+1)^2, I].
        weight: W, [L+1, O, I].
        bias: b, [O].

    Returns:
        y, [N, (L+1)^2, O].
    """
    rows = weight.index_select(0, degree_of_row(weight.shape[0], x.device))
    y = torch.bmm(x.transpose(0, 1), rows.transpose(1, 2))
    if bias is not None:
        y = y + bias * scalar_row(x).unsqueeze(-1)
    return y.transpose(0, 1)


def grouped_linear_reference(
    x: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """y[n] = for every group g and each of its rows, W_g x[n, g, row]: [N, sum rows_g * I_g] -> [N, sum rows_g * O].

    bias: [O], for the first row.
    """
    groups = x.split([r * w.shape[1] for r, w in zip(rows, weights, strict=True)], 1)
    # two dimensions: products of three are taken in one of several ways, which differ in their last bits
    parts = [F.linear(g.reshape(-1, w.shape[1]), w) for g, w in zip(groups, weights, strict=True)]
    y = torch.cat([p.view(x.shape[0], r * p.shape[1]) for p, r in zip(parts, rows, strict=True)], 1)
    return y if bias is None else torch.cat([y[:, : bias.shape[0]] + bias, y[:, bias.shape[0] :]], 1)
