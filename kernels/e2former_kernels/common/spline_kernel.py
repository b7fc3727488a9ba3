"""Pieces of Triton kernels that read a radial network's results from an array or from splines (``radial_table.py``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(at, mask, MASKED: tl.constexpr):
    """What lies at ``at``; with MASKED zero where the mask is false."""
    if MASKED:
        x = tl.load(at, mask=mask, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def spline(features, row, c, K: tl.constexpr, mask, MASKED: tl.constexpr):
    """Value and slope at both ends of an interval, columns c."""
    at = features + row * (2 * K) + c
    return (
        load(at, mask, MASKED),
        load(at + K, mask, MASKED),
        load(at + 2 * K, mask, MASKED),
        load(at + 3 * K, mask, MASKED),
    )


@triton.jit
def feature(
    features, row, position, e, c, mask, K: tl.constexpr, TABLE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Columns c of the features of edge e."""
    if TABLE:
        v0, s0, v1, s1 = spline(features, tl.load(row + e).to(tl.int64), c, K, mask, MASKED)
        f = tl.load(position + e)
        right = f * f * (3.0 - 2.0 * f)
        x = v0 + right * (v1 - v0) + f * (1.0 - f) * ((1.0 - f) * s0 - f * s1)
    else:
        x = load(features + e * K + c, mask, MASKED)
    return x


@triton.jit
def spline_and_slope(features, row, f, c, mask, knots_per_length, K: tl.constexpr, MASKED: tl.constexpr):
    """Columns c of the spline in the interval ``row``, at position f of it, and their derivative by the length."""
    v0, s0, v1, s1 = spline(features, row, c, K, mask, MASKED)
    right = f * f * (3.0 - 2.0 * f)
    x = v0 + right * (v1 - v0) + f * (1.0 - f) * ((1.0 - f) * s0 - f * s1)
    slope = 6.0 * f * (1.0 - f) * (v1 - v0) + (1.0 - f) * (1.0 - 3.0 * f) * s0 + f * (3.0 * f - 2.0) * s1
    return x, slope * knots_per_length


@triton.jit
def place(d, zi, zj, pair_row, inside, Z, intervals, knots_per_length):
    """First row of the interval in which edges of length d between elements zi and zj lie, and the position in it."""
    t = tl.minimum(d * knots_per_length, intervals.to(d.dtype))
    k = tl.minimum(t.to(tl.int32), intervals - 1)
    return tl.load(pair_row + zi * Z + zj, mask=inside, other=0) + k, t - k.to(d.dtype)
