"""Invariant queries and keys from spherical tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from e2former_fairchem.execution import REFERENCE, Execution
from e2former_kernels.query_key import QueryKeyWeights, query_key, query_key_reference

if TYPE_CHECKING:
    from e2former_kernels.query_key.half import HalfWeights
    from e2former_kernels.query_key.op import RowWeights


class QueryKey(nn.Module):
    r"""Query and key of every head, scalars made from all degrees (docs/network.md, section 6.1).

    :math:`s_{lg} = \sum_m ((W_l h_{lm})_g + \delta_{l0} b_g) (W'_l h_{lm})_g`, g = 1..G, G = H S / 2, then
    Linear((L+1) G -> G), LayerNorm, SiLU, Linear(G -> H S). Query and key have weights of their own; they are kept
    side by side (index 0: query, 1: key), so both come out of the same few matrix products.
    """

    def __init__(self, lmax: int, channels: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.lmax, self.num_heads, self.head_dim = lmax, num_heads, head_dim
        width = num_heads * head_dim // 2
        self.width = width
        bound = 1 / math.sqrt(channels)
        # [degree, (factor 0 of query, of key, factor 1 of query, of key), channels]
        self.weight = nn.Parameter(torch.empty(lmax + 1, 4 * width, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(2 * width))
        bound = math.sqrt(6 / ((lmax + 1) * width))
        self.hidden_weight = nn.Parameter(torch.empty(2, width, (lmax + 1) * width).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.zeros(2, width))
        self.norm_weight = nn.Parameter(torch.ones(2, width))
        self.norm_bias = nn.Parameter(torch.zeros(2, width))
        bound = math.sqrt(6 / width)
        self.out_weight = nn.Parameter(torch.empty(2, 2 * width, width).uniform_(-bound, bound))
        self.out_bias = nn.Parameter(torch.zeros(2, 2 * width))

    def weights(self) -> QueryKeyWeights:
        """The parameters as the kernels take them."""
        return QueryKeyWeights(
            self.weight,
            self.bias,
            self.hidden_weight,
            self.hidden_bias,
            self.norm_weight,
            self.norm_bias,
            self.out_weight,
            self.out_bias,
        )

    def prepared(self, execution: Execution) -> HalfWeights | RowWeights | None:
        """The frozen parameters as the kernels' products take them; None where they are not frozen."""
        if execution.frozen is None:
            return None
        from e2former_kernels.query_key.half import half_weights
        from e2former_kernels.query_key.op import row_weights

        if execution.half:
            return execution.made(self, "half", lambda: half_weights(self.weights()))
        return execution.made(self, "rows", lambda: row_weights(self.weights()))

    def forward(
        self, h: Tensor, execution: Execution = REFERENCE, recompute_h: Callable[[], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """h: [N, (lmax+1)^2, C]; recompute_h: gives it once more. Returns query and key, each [N, H, S]."""
        if execution.kernels:
            both = query_key(h, self.weights(), recompute_h, self.prepared(execution), execution.mode)
        else:
            both = query_key_reference(h, self.weights())
        # in memory queries and keys lie apart
        return both.transpose(0, 1).unflatten(-1, (self.num_heads, self.head_dim)).unbind(0)
