"""Queries and keys in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.linear.reference import degree_of_row, scalar_row

LAYER_NORM_EPS = 1e-5


class QueryKeyWeights(NamedTuple):
    """Weights of both maps side by side, index 0: query, 1: key. Widths: G inner, O = heads times head width."""

    weight: Tensor  # [L+1, 4 G, C]: factor 0 of query, of key, factor 1 of query, of key
    bias: Tensor  # [2 G], of the first factors
    hidden_weight: Tensor  # [2, G, (L+1) G]
    hidden_bias: Tensor  # [2, G]
    norm_weight: Tensor  # [2, G]
    norm_bias: Tensor  # [2, G]
    out_weight: Tensor  # [2, O, G]
    out_bias: Tensor  # [2, O]


def invariants(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r""":math:`s_{lg} = \sum_m ((W_l h_{lm})_g + \delta_{l0} b_g) (W'_l h_{lm})_g`, [2, N, (L+1) G].

    docs/network.md, equation 6.1.
    """
    nodes, degrees, width = h.shape[0], weight.shape[0], bias.shape[0]
    degree = degree_of_row(degrees, h.device)
    both = torch.bmm(h.transpose(0, 1), weight.index_select(0, degree).transpose(1, 2))  # [M, N, 4 G]
    both = both + F.pad(bias, (0, width)) * scalar_row(h).unsqueeze(-1)
    left, right = both.chunk(2, -1)
    rows_of = (degree == torch.arange(degrees, device=h.device).unsqueeze(1)).to(h.dtype)  # [L+1, M]
    s = torch.matmul(rows_of, (left * right).flatten(1)).view(degrees, nodes, 2, width // 2)
    return s.permute(2, 1, 0, 3).flatten(2)


def heads_of(s: Tensor, weights: QueryKeyWeights) -> Tensor:
    """Linear, layer norm, SiLU, linear on the invariants [2, N, (L+1) G]. Returns [2, N, O]."""
    x = torch.baddbmm(weights.hidden_bias.unsqueeze(1), s, weights.hidden_weight.transpose(1, 2))
    x = F.layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
    x = F.silu(torch.addcmul(weights.norm_bias.unsqueeze(1), x, weights.norm_weight.unsqueeze(1)))
    return torch.baddbmm(weights.out_bias.unsqueeze(1), x, weights.out_weight.transpose(1, 2))


def query_key_reference(h: Tensor, weights: QueryKeyWeights) -> Tensor:
    """Query and key of every head (docs/network.md, section 6.1).

    Args:
        h: [N, (L+1)^2, C].
        weights: of both maps.

    Returns:
        [N, 2, O], index 0: query, 1: key.
    """
    return heads_of(invariants(h, weights.weight, weights.bias), weights).transpose(0, 1)
