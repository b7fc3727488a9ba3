"""Cutoff envelopes."""

from __future__ import annotations

import torch
from torch import Tensor


def polynomial_envelope(distance: Tensor, cutoff: float, exponent: int) -> Tensor:
    r"""DimeNet's polynomial cutoff (arXiv:2003.03123) in factorised form (docs/network.md, equation 3.2).

    :math:`u = (1-\rho)^3 \sum_{k<p} \frac{(k+1)(k+2)}{2} \rho^k`, :math:`\rho = d / r_c`, zero for :math:`\rho \ge 1`.
    It equals :math:`1 - \frac{(p+1)(p+2)}{2}\rho^p + p(p+2)\rho^{p+1} - \frac{p(p+1)}{2}\rho^{p+2}`, which loses
    all its digits near the cutoff; this form does not.

    Args:
        distance: any shape, Å.
        cutoff: r_c, Å.
        exponent: p, at least 1.

    Returns:
        Values in [0, 1], no unit, of the shape of ``distance``.
    """
    return _Polynomial.apply(distance / cutoff, exponent)


class _Polynomial(torch.autograd.Function):
    r"""The envelope as a function of rho. Its derivative is a single product, which autograd cannot see:
    :math:`u' = -\frac{p(p+1)(p+2)}{2} \rho^{p-1} (1-\rho)^2` (docs/network.md, equation 3.3)."""

    @staticmethod
    def forward(ctx, rho: Tensor, exponent: int) -> Tensor:
        ctx.exponent = exponent
        ctx.save_for_backward(rho)
        series: Tensor | float = (exponent * (exponent + 1)) / 2
        for k in range(exponent - 2, -1, -1):
            series = series * rho + ((k + 1) * (k + 2)) / 2
        gap = (1.0 - rho).clamp(min=0.0)
        return gap * gap * gap * series

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rho,), p = ctx.saved_tensors, ctx.exponent
        gap = (1.0 - rho).clamp(min=0.0)
        return grad * (-0.5 * p * (p + 1) * (p + 2)) * rho ** (p - 1) * gap.square(), None


def bell_envelope(distance: Tensor, lower: float, upper: float) -> Tensor:
    r""":math:`(1-t^2)^2` with :math:`t = (2d - d_0 - d_1)/(d_1 - d_0)`, zero outside [d_0, d_1].

    docs/network.md, equation 3.4.

    Args:
        distance: any shape, Å.
        lower: d_0, Å.
        upper: d_1, Å.

    Returns:
        Values in [0, 1], no unit, of the shape of ``distance``.
    """
    t = (2.0 * distance - (lower + upper)) / (upper - lower)
    gap = (1.0 - t * t).clamp(min=0.0)
    return gap * gap
