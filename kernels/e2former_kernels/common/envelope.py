"""Cutoff envelopes."""

from __future__ import annotations

from torch import Tensor


def polynomial_envelope(distance: Tensor, cutoff: float, exponent: int) -> Tensor:
    r"""DimeNet's polynomial cutoff (arXiv:2003.03123) in factorised form.

    :math:`u = (1-\rho)^3 \sum_{k<p} \frac{(k+1)(k+2)}{2} \rho^k`, :math:`\rho = d / r_c`, zero for :math:`\rho \ge 1`.
    It equals :math:`1 - \frac{(p+1)(p+2)}{2}\rho^p + p(p+2)\rho^{p+1} - \frac{p(p+1)}{2}\rho^{p+2}`, which loses
    all its digits near the cutoff; this form does not.

    distance: Å, any shape. cutoff: Å. exponent: p >= 1. Returns unitless values in [0, 1].
    """
    rho = distance / cutoff
    series = (exponent * (exponent + 1)) / 2
    for k in range(exponent - 2, -1, -1):
        series = series * rho + ((k + 1) * (k + 2)) / 2
    gap = (1.0 - rho).clamp(min=0.0)
    return gap * gap * gap * series


def bell_envelope(distance: Tensor, lower: float, upper: float) -> Tensor:
    r""":math:`(1-t^2)^2` with :math:`t = (2d - d_0 - d_1)/(d_1 - d_0)`, zero outside [d_0, d_1].

    distance, lower = d_0, upper = d_1: Å. Returns unitless values in [0, 1].
    """
    t = (2.0 * distance - (lower + upper)) / (upper - lower)
    gap = (1.0 - t * t).clamp(min=0.0)
    return gap * gap
