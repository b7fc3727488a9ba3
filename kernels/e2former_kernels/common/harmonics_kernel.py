"""Steps of the recurrences of ``common/harmonics.py`` that Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in every module with kernels


@triton.jit
def next_order(c, s, x, z):
    """c + i s = (z + i x)^m of the next order m."""
    return c * z - s * x, s * z + c * x


@triton.jit
def next_order_slopes(c, s, cx, cz, sx, sz, x, z):
    """Derivatives of :func:`next_order`'s c and s by x and z (cx, cz, sx, sz), from those of this order m."""
    return cx * z - sx * x - s, cz * z + c - sz * x, sx * z + cx * x + c, sz * z + s + cz * x
