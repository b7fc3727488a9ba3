"""Triton kernels of the weighted harmonics y = u(d) Y(direction) / mean degree, and of their derivative.

The recurrences are those of ``common/harmonics.py`` on the unit sphere: (z + ix)^m = c + i s around the polar axis y,
Legendre polynomials p along it.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.envelope_kernel import polynomial
from e2former_kernels.common.harmonics_kernel import next_order, next_order_slopes
from e2former_kernels.common.tiles import ceil_div
from e2former_kernels.edge_degree.reference import AVERAGE_DEGREE


@triton.jit
def _direction(vec, e, inside):
    x = tl.load(vec + 3 * e, mask=inside, other=1.0)
    y = tl.load(vec + 3 * e + 1, mask=inside, other=1.0)
    z = tl.load(vec + 3 * e + 2, mask=inside, other=1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    return x / d, y / d, z / d, d


@triton.jit
def harmonics_kernel(vec, scales, distance, out, E, cutoff, L: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """distance [E] and out [E, (L+1)^2]. scales: [L+1, L+1], the factor of each degree and order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = _direction(vec, e, inside)
    tl.store(distance + e, d, mask=inside)
    u, _ = polynomial(d, cutoff, P)
    to = out + e * ((L + 1) * (L + 1))
    c = 0.0 * x + 1.0
    s = 0.0 * x
    top = 0.0 * x + 1.0
    for m in tl.static_range(L + 1):
        before = 0.0 * x
        p = top
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * before) / (l - m)
                before = p
                p = after
            factor = u * p * tl.load(scales + l * (L + 1) + m)
            tl.store(to + l * l + l + m, factor * c, mask=inside)
            if m > 0:
                tl.store(to + l * l + l - m, factor * s, mask=inside)
        top = top * (2 * m + 1)
        c, s = next_order(c, s, x, z)


@triton.jit
def harmonics_backward_kernel(
    grad, grad_distance, vec, scales, out, E, cutoff, L: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient by vec from those by out [E, (L+1)^2] and by distance [E] of harmonics_kernel."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = _direction(vec, e, inside)
    u, du = polynomial(d, cutoff, P)
    at = grad + e * ((L + 1) * (L + 1))
    c = 0.0 * x + 1.0
    s = 0.0 * x
    # derivatives of c and s by x and z; p depends on y alone
    cx, cz, sx, sz = s, s, s, s
    gx, gy, gz, total = s, s, s, s
    top = c
    for m in tl.static_range(L + 1):
        before = 0.0 * x
        p = top
        slope_before = 0.0 * x
        slope = 0.0 * x
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * before) / (l - m)
                slope_after = ((2 * l - 1) * (p + y * slope) - (l + m - 1) * slope_before) / (l - m)
                before = p
                p = after
                slope_before = slope
                slope = slope_after
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * tl.load(at + l * l + l + m, mask=inside, other=0.0)
            gx += g * p * cx
            gy += g * slope * c
            gz += g * p * cz
            total += g * p * c
            if m > 0:
                g = scale * tl.load(at + l * l + l - m, mask=inside, other=0.0)
                gx += g * p * sx
                gy += g * slope * s
                gz += g * p * sz
                total += g * p * s
        top = top * (2 * m + 1)
        cx, cz, sx, sz = next_order_slopes(c, s, cx, cz, sx, sz, x, z)
        c, s = next_order(c, s, x, z)
    along = gx * x + gy * y + gz * z
    radial = du * total + tl.load(grad_distance + e, mask=inside, other=0.0)
    tl.store(out + 3 * e, u * (gx - along * x) / d + radial * x, mask=inside)
    tl.store(out + 3 * e + 1, u * (gy - along * y) / d + radial * y, mask=inside)
    tl.store(out + 3 * e + 2, u * (gz - along * z) / d + radial * z, mask=inside)


@functools.lru_cache(maxsize=8)
def harmonic_scales(lmax: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Factor of each degree and order, [lmax+1, lmax+1]."""
    table = torch.zeros(lmax + 1, lmax + 1, dtype=torch.float64)
    for l in range(lmax + 1):
        for m in range(l + 1):
            square = (2 * l + 1) * math.factorial(l - m) / math.factorial(l + m) * (1 if m == 0 else 2)
            table[l, m] = math.sqrt(square) / AVERAGE_DEGREE
    with torch.inference_mode(False):
        return table.to(device, dtype)


def weighted_harmonics(vec: Tensor, lmax: int, cutoff: float, exponent: int) -> tuple[Tensor, Tensor]:
    """Lengths [E] and u(d) Y / mean degree [E, (lmax+1)^2] of vec [E, 3], contiguous. No gradient."""
    edges = vec.shape[0]
    distance, out = vec.new_empty(edges), vec.new_empty(edges, (lmax + 1) ** 2)
    if edges:
        scales = harmonic_scales(lmax, vec.dtype, vec.device)
        harmonics_kernel[(ceil_div(edges, 128),)](
            vec, scales, distance, out, edges, float(cutoff), L=lmax, P=exponent, BLOCK=128
        )
    return distance, out


def weighted_harmonics_backward(
    grad: Tensor, grad_distance: Tensor, vec: Tensor, lmax: int, cutoff: float, exponent: int
) -> Tensor:
    """Gradient of :func:`weighted_harmonics` by vec, [E, 3]."""
    out = torch.empty_like(vec)
    if vec.shape[0]:
        scales = harmonic_scales(lmax, vec.dtype, vec.device)
        harmonics_backward_kernel[(ceil_div(vec.shape[0], 128),)](
            grad.contiguous(), grad_distance.contiguous(), vec, scales, out, vec.shape[0], float(cutoff),
            L=lmax, P=exponent, BLOCK=128,
        )  # fmt: skip
    return out
