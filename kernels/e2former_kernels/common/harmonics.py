"""Real spherical and solid harmonics in e3nn's order, for any degree: in PyTorch, and by recursion for Triton kernels.

The polar axis is y: degree l has rows m = -l..l, and (z, x) play the part that (x, y) play in most textbooks,
so that degree one reads (x, y, z). "Component" normalisation: the squares of one degree sum to 2l+1 on the sphere.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from e2former_kernels.common.tiles import tl, triton


def solid_harmonics(vec: Tensor, lmax: int) -> Tensor:
    r"""Regular solid harmonics :math:`|r|^l Y^l_m(\hat r)`, component normalisation (docs/network.md, equation 1.4).

    They are polynomials, so every derivative exists everywhere, the origin included.

    Recurrences (with :math:`P^m_l` the associated Legendre polynomials without the Condon-Shortley phase, made
    homogeneous by :math:`\Pi^m_l = r^{l-m} P^m_l(y/r) / \sin^m`):
    :math:`\Pi^l_l = (2l-1)!!`, :math:`\Pi^m_{m+1} = (2m+1)\, y\, \Pi^m_m`,
    :math:`(l-m) \Pi^m_l = (2l-1)\, y\, \Pi^m_{l-1} - (l+m-1)\, r^2\, \Pi^m_{l-2}`;
    the azimuthal part is the real and imaginary part of :math:`(z + i x)^m`.

    Args:
        vec: [..., 3], any unit of length.
        lmax: 0 or more.

    Returns:
        [..., (lmax+1)^2], degree l in that unit to the power l.
    """
    x, y, z = vec.unbind(-1)
    r2 = (vec * vec).sum(-1)
    # azimuthal parts: cos_m = Re (z + ix)^m, sin_m = Im (z + ix)^m; what is constant stays a number
    cos: list[Tensor | float] = [1.0, z]
    sin: list[Tensor | float] = [0.0, x]
    for _ in range(1, lmax):
        c, s = cos[-1], sin[-1]
        cos.append(c * z - s * x)
        sin.append(s * z + c * x)
    polar: dict[tuple[int, int], Tensor | float] = {}
    for m in range(lmax + 1):
        polar[m, m] = float(math.prod(range(1, 2 * m, 2)))
        if m < lmax:
            polar[m + 1, m] = y * ((2 * m + 1) * polar[m, m])
        for degree in range(m + 2, lmax + 1):
            polar[degree, m] = (
                (2 * degree - 1) * y * polar[degree - 1, m] - (degree + m - 1) * r2 * polar[degree - 2, m]
            ) / (degree - m)
    rows = [torch.ones_like(x)]
    for degree in range(1, lmax + 1):
        for m in range(-degree, degree + 1):
            a = abs(m)
            rows.append((_scale(degree, a) * polar[degree, a]) * (sin[a] if m < 0 else cos[a]))
    return torch.stack(rows, -1)


@functools.lru_cache(maxsize=8)
def harmonic_scales(lmax: int, divisor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the kernels' recurrences are multiplied by for each degree and |m|, over ``divisor``: [lmax+1, lmax+1]."""
    scales = torch.zeros(lmax + 1, lmax + 1, dtype=torch.float64)
    for degree in range(lmax + 1):
        for m in range(degree + 1):
            scales[degree, m] = _scale(degree, m) / divisor
    with torch.inference_mode(False):
        return scales.to(device, dtype)


def _scale(degree: int, m: int) -> float:
    """The root in docs/network.md, equation 1.4, for the order ``|m|``."""
    return math.sqrt((2 * degree + 1) * math.factorial(degree - m) / math.factorial(degree + m) * (1 if m == 0 else 2))


@triton.jit
def degree_of(m):
    """Degree of row m, for up to 25 rows."""
    one = m * 0 + 1
    return tl.where(m >= 1, one, 0) + tl.where(m >= 4, one, 0) + tl.where(m >= 9, one, 0) + tl.where(m >= 16, one, 0)


@triton.jit
def next_order(c, s, x, z):
    """c + i s = (z + i x)^m of the next order m."""
    return c * z - s * x, s * z + c * x


@triton.jit
def next_order_slopes(c, s, cx, cz, sx, sz, x, z):
    """Derivatives of :func:`next_order`'s c and s by x and z (cx, cz, sx, sz), from those of this order m."""
    return cx * z - sx * x - s, cz * z + c - sz * x, sx * z + cx * x + c, sz * z + s + cz * x


@triton.jit
def next_order_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot):
    """Change of :func:`next_order`."""
    return c_dot * z + c * z_dot - s_dot * x - s * x_dot, s_dot * z + s * z_dot + c_dot * x + c * x_dot


@triton.jit
def next_order_slopes_dot(c_dot, s_dot, cx, cz, sx, sz, cx_dot, cz_dot, sx_dot, sz_dot, x, z, x_dot, z_dot):
    """Change of :func:`next_order_slopes`."""
    return (
        cx_dot * z + cx * z_dot - sx_dot * x - sx * x_dot - s_dot,
        cz_dot * z + cz * z_dot + c_dot - sz_dot * x - sz * x_dot,
        sx_dot * z + sx * z_dot + cx_dot * x + cx * x_dot + c_dot,
        sz_dot * z + sz * z_dot + s_dot + cz_dot * x + cz * x_dot,
    )


@triton.jit
def add_slopes(gx, gy, gz, gr, g, p, py, pr, c, cx, cz):
    """Adds g times the derivatives of p c, a harmonic, by x, y, z and, ``pr``, by r^2."""
    return gx + g * p * cx, gy + g * py * c, gz + g * p * cz, gr + g * pr * c


@triton.jit
def degree_two(x, y, z):
    """Harmonics of degree 2 of a direction over the root of 5 (component normalisation): their norm is 1."""
    root: tl.constexpr = 1.7320508075688772
    return root * x * z, root * x * y, y * y - 0.5 * (x * x + z * z), root * y * z, 0.5 * root * (z * z - x * x)


@triton.jit
def degree_two_dot(x, y, z, a, b, c):
    """Change of :func:`degree_two` along (a, b, c)."""
    root: tl.constexpr = 1.7320508075688772
    return (
        root * (a * z + x * c),
        root * (a * y + x * b),
        2.0 * y * b - x * a - z * c,
        root * (b * z + y * c),
        root * (z * c - x * a),
    )


@triton.jit
def degree_two_back(g0, g1, g2, g3, g4, x, y, z):
    """Gradient by the direction of <g, degree_two>, linear in it."""
    root: tl.constexpr = 1.7320508075688772
    gx = root * (g0 * z + g1 * y - g4 * x) - g2 * x
    gy = root * (g1 * x + g3 * z) + 2.0 * g2 * y
    gz = root * (g0 * x + g3 * y + g4 * z) - g2 * z
    return gx, gy, gz


@triton.jit
def load_vector(x, e, inside, other):
    """The three columns of x [E, 3]."""
    a = tl.load(x + 3 * e, mask=inside, other=other)
    b = tl.load(x + 3 * e + 1, mask=inside, other=other)
    c = tl.load(x + 3 * e + 2, mask=inside, other=other)
    return a, b, c


@triton.jit
def store_vector(x, e, inside, a, b, c):
    """The three columns of x [E, 3]."""
    tl.store(x + 3 * e, a, mask=inside)
    tl.store(x + 3 * e + 1, b, mask=inside)
    tl.store(x + 3 * e + 2, c, mask=inside)


@triton.jit
def vector_of(vec, e, inside, UNIT: tl.constexpr):
    """Edge vectors, with UNIT their directions, and their lengths."""
    x, y, z = load_vector(vec, e, inside, 1.0)
    d = tl.sqrt(x * x + y * y + z * z)
    if UNIT:
        x, y, z = x / d, y / d, z / d
    return x, y, z, d


@triton.jit
def vector_dot(vec_dot, e, inside, x, y, z, d, UNIT: tl.constexpr):
    """Change of :func:`vector_of` along vec_dot; that of the length with UNIT only."""
    a, b, c = load_vector(vec_dot, e, inside, 0.0)
    along = 0.0 * x
    if UNIT:
        along = x * a + y * b + z * c
        a, b, c = (a - along * x) / d, (b - along * y) / d, (c - along * z) / d
    return a, b, c, along
