r"""Triton kernels of the directional gate's harmonics along a change of the edge vectors, and of the gradient of both.

Y = S(n), the solid harmonics by the recurrences of ``directional_kernel.py``, whose every variable has a change beside
it (``_dot``); n is the vector, or with UNIT the direction. The gradient by n of <g, Y> is q = S_n^T g, that of <h, Y'>
the change q' of the same expression with h for g. UNIT: by the vector they are P q / d and the change of P q / d, with
P q = q - <q, n> n.
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.harmonics_kernel import next_order, next_order_slopes
from e2former_kernels.equivariant_attention.directional_kernel import _parts, _vector


@triton.jit
def _change(vec_dot, e, inside, x, y, z, d, UNIT: tl.constexpr):
    """Change of what ``_vector`` returns, along vec_dot."""
    a = tl.load(vec_dot + 3 * e, mask=inside, other=0.0)
    b = tl.load(vec_dot + 3 * e + 1, mask=inside, other=0.0)
    c = tl.load(vec_dot + 3 * e + 2, mask=inside, other=0.0)
    along = 0.0 * x
    if UNIT:
        along = a * x + b * y + c * z
        a, b, c = (a - along * x) / d, (b - along * y) / d, (c - along * z) / d
    return a, b, c, along


@triton.jit
def _next_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot):
    """Change of ``next_order``."""
    return c_dot * z + c * z_dot - s_dot * x - s * x_dot, s_dot * z + s * z_dot + c_dot * x + c * x_dot


@triton.jit
def _next_slopes_dot(c_dot, s_dot, cx, cz, sx, sz, cx_dot, cz_dot, sx_dot, sz_dot, x, z, x_dot, z_dot):
    """Change of ``next_order_slopes``."""
    return (
        cx_dot * z + cx * z_dot - sx_dot * x - sx * x_dot - s_dot,
        cz_dot * z + cz * z_dot + c_dot - sz_dot * x - sz * x_dot,
        sx_dot * z + sx * z_dot + cx_dot * x + cx * x_dot + c_dot,
        sz_dot * z + sz * z_dot + s_dot + cz_dot * x + cz * x_dot,
    )


@triton.jit(do_not_specialize=["E"])  # one edge would make E a constant, which has no .to
def harmonics_pair_kernel(vec, vec_dot, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """out [2, E, M]: Y and its change along vec_dot. scales: [L+1, L+1], the factor of each degree and order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = _vector(vec, e, inside, UNIT)
    x_dot, y_dot, z_dot, _ = _change(vec_dot, e, inside, x, y, z, d, UNIT)
    r2 = x * x + y * y + z * z
    r2_dot = 2.0 * (x * x_dot + y * y_dot + z * z_dot)
    M: tl.constexpr = (L + 1) * (L + 1)
    to = out + e * M
    to_dot = to + E.to(tl.int64) * M
    zero = 0.0 * x
    c = zero + 1.0
    s = zero
    c_dot, s_dot = zero, zero
    top = c
    for m in tl.static_range(L + 1):
        before = zero
        before_dot = zero
        p = top
        p_dot = zero
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                after_dot = (2 * l - 1) * (y_dot * p + y * p_dot)
                after_dot = (after_dot - (l + m - 1) * (r2_dot * before + r2 * before_dot)) / (l - m)
                before = p
                before_dot = p_dot
                p = after
                p_dot = after_dot
            scale = tl.load(scales + l * (L + 1) + m)
            tl.store(to + l * l + l + m, scale * p * c, mask=inside)
            tl.store(to_dot + l * l + l + m, scale * (p_dot * c + p * c_dot), mask=inside)
            if m > 0:
                tl.store(to + l * l + l - m, scale * p * s, mask=inside)
                tl.store(to_dot + l * l + l - m, scale * (p_dot * s + p * s_dot), mask=inside)
        top = top * (2 * m + 1)
        c_dot, s_dot = _next_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot)
        c, s = next_order(c, s, x, z)


@triton.jit(do_not_specialize=["E"])
def harmonics_second_kernel(
    grad, vec, vec_dot, scales, out, E, L: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
):
    """out [E, 3] += gradient by vec of <g, Y> + <h, Y'>. grad: [S, 2, E, M], g and h in S parts that are added up."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    x, y, z, d = _vector(vec, e, inside, UNIT)
    x_dot, y_dot, z_dot, d_dot = _change(vec_dot, e, inside, x, y, z, d, UNIT)
    r2 = x * x + y * y + z * z
    r2_dot = 2.0 * (x * x_dot + y * y_dot + z * z_dot)
    M: tl.constexpr = (L + 1) * (L + 1)
    plane = E.to(tl.int64) * M
    at = grad + e * M
    zero = 0.0 * x
    c = zero + 1.0
    s = zero
    c_dot, s_dot = zero, zero
    # derivatives of c and s by x and z; p depends on y and r2
    cx, cz, sx, sz = zero, zero, zero, zero
    cx_dot, cz_dot, sx_dot, sz_dot = zero, zero, zero, zero
    # g: q and what comes through r2, with q' of h added; h: the same numbers without the changes
    gx, gy, gz, by_r2 = zero, zero, zero, zero
    hx, hy, hz, h_r2 = zero, zero, zero, zero
    top = c
    for m in tl.static_range(L + 1):
        before = zero
        before_y = zero
        before_r = zero
        before_dot = zero
        before_y_dot = zero
        before_r_dot = zero
        p = top
        py = zero
        pr = zero
        p_dot = zero
        py_dot = zero
        pr_dot = zero
        for l in tl.static_range(m, L + 1):
            if l > m:
                after = ((2 * l - 1) * y * p - (l + m - 1) * r2 * before) / (l - m)
                after_y = ((2 * l - 1) * (p + y * py) - (l + m - 1) * r2 * before_y) / (l - m)
                after_r = ((2 * l - 1) * y * pr - (l + m - 1) * (before + r2 * before_r)) / (l - m)
                after_dot = (2 * l - 1) * (y_dot * p + y * p_dot)
                after_dot = (after_dot - (l + m - 1) * (r2_dot * before + r2 * before_dot)) / (l - m)
                after_y_dot = (2 * l - 1) * (p_dot + y_dot * py + y * py_dot)
                after_y_dot = (after_y_dot - (l + m - 1) * (r2_dot * before_y + r2 * before_y_dot)) / (l - m)
                after_r_dot = (l + m - 1) * (before_dot + r2_dot * before_r + r2 * before_r_dot)
                after_r_dot = ((2 * l - 1) * (y_dot * pr + y * pr_dot) - after_r_dot) / (l - m)
                before = p
                before_y = py
                before_r = pr
                before_dot = p_dot
                before_y_dot = py_dot
                before_r_dot = pr_dot
                p = after
                py = after_y
                pr = after_r
                p_dot = after_dot
                py_dot = after_y_dot
                pr_dot = after_r_dot
            scale = tl.load(scales + l * (L + 1) + m)
            g = scale * _parts(at + l * l + l + m, 2 * plane, inside, S)
            h = scale * _parts(at + plane + l * l + l + m, 2 * plane, inside, S)
            gx += g * p * cx + h * (p_dot * cx + p * cx_dot)
            gy += g * py * c + h * (py_dot * c + py * c_dot)
            gz += g * p * cz + h * (p_dot * cz + p * cz_dot)
            by_r2 += g * pr * c + h * (pr_dot * c + pr * c_dot)
            hx += h * p * cx
            hy += h * py * c
            hz += h * p * cz
            h_r2 += h * pr * c
            if m > 0:
                g = scale * _parts(at + l * l + l - m, 2 * plane, inside, S)
                h = scale * _parts(at + plane + l * l + l - m, 2 * plane, inside, S)
                gx += g * p * sx + h * (p_dot * sx + p * sx_dot)
                gy += g * py * s + h * (py_dot * s + py * s_dot)
                gz += g * p * sz + h * (p_dot * sz + p * sz_dot)
                by_r2 += g * pr * s + h * (pr_dot * s + pr * s_dot)
                hx += h * p * sx
                hy += h * py * s
                hz += h * p * sz
                h_r2 += h * pr * s
        top = top * (2 * m + 1)
        cx_dot, cz_dot, sx_dot, sz_dot = _next_slopes_dot(
            c_dot, s_dot, cx, cz, sx, sz, cx_dot, cz_dot, sx_dot, sz_dot, x, z, x_dot, z_dot
        )
        cx, cz, sx, sz = next_order_slopes(c, s, cx, cz, sx, sz, x, z)
        c_dot, s_dot = _next_dot(c, s, c_dot, s_dot, x, z, x_dot, z_dot)
        c, s = next_order(c, s, x, z)
    gx += 2.0 * (x * by_r2 + x_dot * h_r2)
    gy += 2.0 * (y * by_r2 + y_dot * h_r2)
    gz += 2.0 * (z * by_r2 + z_dot * h_r2)
    if UNIT:
        hx += 2.0 * x * h_r2
        hy += 2.0 * y * h_r2
        hz += 2.0 * z * h_r2
        along = gx * x + gy * y + gz * z + hx * x_dot + hy * y_dot + hz * z_dot
        across = hx * x + hy * y + hz * z
        fade = d_dot / d  # of 1/d, which stands before the projection
        gx = (gx - along * x - across * x_dot - fade * (hx - across * x)) / d
        gy = (gy - along * y - across * y_dot - fade * (hy - across * y)) / d
        gz = (gz - along * z - across * z_dot - fade * (hz - across * z)) / d
    to = out + 3 * e
    tl.store(to, tl.load(to, mask=inside, other=0.0) + gx, mask=inside)
    tl.store(to + 1, tl.load(to + 1, mask=inside, other=0.0) + gy, mask=inside)
    tl.store(to + 2, tl.load(to + 2, mask=inside, other=0.0) + gz, mask=inside)
