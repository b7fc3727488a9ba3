"""The polynomial envelope inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def polynomial(d, cutoff, P: tl.constexpr):
    """DimeNet's envelope in factorised form and its derivative by the distance (common/envelope.py)."""
    rho = d / cutoff
    series = 0.0 * rho + P * (P + 1) / 2
    slope = 0.0 * rho
    for n in tl.static_range(P - 1):
        slope = slope * rho + series
        series = series * rho + (P - 1 - n) * (P - n) / 2
    gap = tl.maximum(1.0 - rho, 0.0)
    return gap * gap * gap * series, gap * gap * (gap * slope - 3.0 * series) / cutoff


@triton.jit
def polynomial_bend(d, cutoff, P: tl.constexpr):
    """Second derivative of :func:`polynomial` by the distance."""
    rho = d / cutoff
    gap = tl.maximum(1.0 - rho, 0.0)
    if P == 1:
        bend = 2.0 * gap
    else:
        bend = gap * (2.0 * rho - (P - 1) * gap)
        for _n in tl.static_range(P - 2):
            bend *= rho
    return bend * (0.5 * P * (P + 1) * (P + 2)) / (cutoff * cutoff)
