"""Linear maps that act on each degree separately."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from e2former_fairchem.execution import REFERENCE, Execution
from e2former_kernels.linear import so3_linear, so3_linear_reference, so3_rows


def kaiming_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """``nn.Linear`` as the authors start it: weight uniform within sqrt(6 / fan_in), bias zero."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    bound = math.sqrt(6 / in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class SO3Linear(nn.Module):
    r""":math:`y_{l m o} = \sum_c W^l_{o c} x_{l m c} + \delta_{l 0} b_o` (docs/network.md, equation 1.7).

    weight: [lmax+1, out, in], uniform within 1/sqrt(in); bias: [out], zero, or None.
    """

    def __init__(self, lmax: int, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(torch.empty(lmax + 1, out_channels, in_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor, execution: Execution = REFERENCE) -> Tensor:
        """x: [N, (lmax+1)^2, in] -> [N, (lmax+1)^2, out]. With kernels: strided products, no copies of rows."""
        if execution.kernels:
            rows = None
            if execution.frozen is not None:
                rows = execution.made(self, "rows", lambda: so3_rows(self.weight))
            return so3_linear(x, self.weight, self.bias, rows=rows, mode=execution.mode)
        return so3_linear_reference(x, self.weight, self.bias)
