r"""Triton row kernels of the radial networks: value, also with its tangent, and the gradients of both.

Layout [G, T, E, h]: T = 1 for the value alone; T = 2 for the value (row 0) and its derivative along a given change of
the distances (row 1, the "tangent"). Then the layers between are single matrix products on [G, T E, h].

A layer is a = SiLU(y), y = gamma n + beta, n = LN(x), with r the inverse deviation of x and J v = r (v - mean v -
n mean(n v)) the symmetric derivative of n. Its tangent is a' = SiLU'(y) gamma J x'. From the gradients A, A' by a, a':
with Y' = SiLU'(y) A' and Y = SiLU'(y) A + SiLU''(y) y' A' by y' and y, and v = gamma Y', the gradient by x' is J v, by
x it is J(gamma Y - r (v mean(n x') + x' mean(n v))) - r n mean(v J x'), by gamma n Y + (J x') Y', by beta Y.
"""

from __future__ import annotations

import functools
import math

import triton
import triton.language as tl

from e2former_kernels.common.tiles import next_power
from e2former_kernels.radial.reference import LAYER_NORM_EPS


@functools.lru_cache(maxsize=64)
def row_launch(
    rows: int, groups: int, width: int, numbers: int, programs: int | None, **flags: bool
) -> tuple[tuple[int, int], dict, int]:
    """Grid and constants of these kernels on [groups, rows, width], and the tiles of one program.

    numbers: of a tile. programs: of a group at most, where they write partial sums; None: each has one tile.
    """
    padded = next_power(width)
    block = max(numbers // padded, 1)
    tiles = 1 if programs is None else math.ceil(math.ceil(rows / block) / programs)
    constants = {"E": rows, "G": groups, "H": width, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": block, "num_warps": 4}
    return (math.ceil(rows / (block * tiles)), groups), constants | flags, tiles


@triton.jit
def _layer_norm(x, weight, bias, at, inside, H, EPS: tl.constexpr):
    """(normalised, 1/std, affine result) of the rows of x, whose columns beyond H are zero."""
    mean = tl.sum(x, axis=1) / H
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / H + EPS)
    normal = centred * rstd[:, None]
    gamma = tl.load(weight + at, mask=inside, other=0.0)
    beta = tl.load(bias + at, mask=inside, other=0.0)
    return normal, rstd, normal * gamma[None, :] + beta[None, :]


@triton.jit
def _cubic(d, knots, at, inside, G, H, intervals, scale, SLOPE: tl.constexpr):
    """Piecewise cubic W0 phi(d), or its derivative by d.

    knots: [intervals, 4, G, H], coefficients in the position within the interval, 0 to 1. Constant beyond the last.
    """
    t = tl.minimum(d * scale, intervals.to(d.dtype))
    k = tl.minimum(t.to(tl.int32), intervals - 1)
    f = (t - k.to(d.dtype))[:, None]
    row = G * H
    base = knots + (k * 4 * row)[:, None] + at[None, :]
    inside = inside[None, :]
    if SLOPE:
        x = 3.0 * f * tl.load(base + 3 * row, mask=inside, other=0.0)
        x = f * (x + 2.0 * tl.load(base + 2 * row, mask=inside, other=0.0))
        x = (x + tl.load(base + row, mask=inside, other=0.0)) * scale
        x = tl.where((d * scale <= intervals.to(d.dtype))[:, None], x, 0.0)
    else:
        x = f * tl.load(base + 3 * row, mask=inside, other=0.0)
        x = f * (x + tl.load(base + 2 * row, mask=inside, other=0.0))
        x = f * (x + tl.load(base + row, mask=inside, other=0.0))
        x += tl.load(base, mask=inside, other=0.0)
    return x


@triton.jit
def _first_layer(
    d, e, in_e, zt, zs, knots, target_embedding, source_embedding, at, inside, E, G, H, intervals, scale, g,
    SPLINE: tl.constexpr,
):  # fmt: skip
    """W0 phi(d) + T[z_i] + S[z_j] of a tile of edges. SPLINE false: ``knots`` holds W0 phi(d) itself, [G, E, H]."""
    both = in_e[:, None] & inside[None, :]
    if SPLINE:
        x = _cubic(d, knots, at, inside, G, H, intervals, scale, False)
    else:
        x = tl.load(knots + (g * E + e)[:, None] * H + (at - g * H)[None, :], mask=both, other=0.0)
    x += tl.load(target_embedding + zt[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    x += tl.load(source_embedding + zs[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
    return x


@triton.jit
def _project(v, normal, rstd, inside, H):
    """J v of the rows of v, whose columns beyond H are zero."""
    mean = tl.sum(v, axis=1) / H
    along = tl.sum(v * normal, axis=1) / H
    return tl.where(inside[None, :], (v - mean[:, None] - normal * along[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _layer(x, x_dot, gamma, beta, at, inside, H, EPS: tl.constexpr, NORM: tl.constexpr, TANGENT: tl.constexpr):
    """a and a' (a twice without TANGENT)."""
    y = x
    y_dot = x_dot
    if NORM:
        normal, rstd, y = _layer_norm(x, gamma, beta, at, inside, H, EPS)
        if TANGENT:
            y_dot = _project(x_dot, normal, rstd, inside, H) * tl.load(gamma + at, mask=inside, other=0.0)[None, :]
    gate = 1.0 / (1.0 + tl.exp(-y))
    a = y * gate
    a_dot = a
    if TANGENT:
        a_dot = gate * (1.0 + y * (1.0 - gate)) * y_dot
    return a, a_dot


@triton.jit
def _layer_backward(
    grad, grad_dot, x, x_dot, gamma, beta, at, inside, H, EPS: tl.constexpr, NORM: tl.constexpr, TANGENT: tl.constexpr
):
    """Gradients by x, x', and the terms of each row of the gradients by gamma and beta."""
    y = x
    if NORM:
        normal, rstd, y = _layer_norm(x, gamma, beta, at, inside, H, EPS)
        factor = tl.load(gamma + at, mask=inside, other=0.0)[None, :]
    gate = 1.0 / (1.0 + tl.exp(-y))
    slope = gate * (1.0 + y * (1.0 - gate))
    grad_y = slope * grad
    grad_x_dot = grad_y
    if TANGENT:
        bend = gate * (1.0 - gate) * (2.0 + y * (1.0 - 2.0 * gate))
        grad_x_dot = slope * grad_dot
        if NORM:
            normal_dot = _project(x_dot, normal, rstd, inside, H)
            grad_y += bend * normal_dot * factor * grad_dot
        else:
            grad_y += bend * x_dot * grad_dot
    grad_x = grad_y
    to_gamma = grad_y
    if NORM:
        to_gamma = normal * grad_y
        grad_normal = grad_y * factor
        if TANGENT:
            to_gamma += normal_dot * grad_x_dot
            v = grad_x_dot * factor
            along = tl.sum(v * normal, axis=1) / H
            along_dot = tl.sum(x_dot * normal, axis=1) / H
            stretch = tl.sum(v * normal_dot, axis=1) / H
            grad_normal -= rstd[:, None] * (v * along_dot[:, None] + x_dot * along[:, None])
            mean = tl.sum(v, axis=1) / H
            v = (v - mean[:, None] - normal * along[:, None]) * rstd[:, None]
            grad_x_dot = tl.where(inside[None, :], v, 0.0)
        grad_x = _project(grad_normal, normal, rstd, inside, H)
        if TANGENT:
            grad_x -= normal * (rstd * stretch)[:, None]
    return grad_x, grad_x_dot, to_gamma, grad_y


@triton.jit
def _slope(d, row, both, knots, slopes, at, inside, G, H, intervals, scale, SPLINE: tl.constexpr):
    """d/dd of W0 phi(d): from the knots, or read from ``slopes`` [G, E, h]."""
    if SPLINE:
        x = _cubic(d, knots, at, inside, G, H, intervals, scale, True)
    else:
        x = tl.load(slopes + row, mask=both, other=0.0)
    return x


@triton.jit
def first_layer_kernel(
    distance, distance_dot, target_species, source_species, knots, slopes, target_embedding, source_embedding, gamma,
    beta, out, E, G, H, intervals, scale,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, SPLINE: tl.constexpr,
    TANGENT: tl.constexpr,
):  # fmt: skip
    """out[g, 0, e] = SiLU(LN(W0 phi(d) + T[z_i] + S[z_j])), out[g, 1, e] its tangent."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    in_e = e < E
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    both = in_e[:, None] & inside[None, :]
    d = tl.load(distance + e, mask=in_e, other=0.0)
    zt = tl.load(target_species + e, mask=in_e, other=0)
    zs = tl.load(source_species + e, mask=in_e, other=0)
    x = _first_layer(
        d, e, in_e, zt, zs, knots, target_embedding, source_embedding, at, inside, E, G, H, intervals, scale, g, SPLINE
    )
    x_dot = x
    T: tl.constexpr = 2 if TANGENT else 1
    if TANGENT:
        row = (g * E + e)[:, None] * H + c[None, :]
        x_dot = _slope(d, row, both, knots, slopes, at, inside, G, H, intervals, scale, SPLINE)
        x_dot = x_dot * tl.load(distance_dot + e, mask=in_e, other=0.0)[:, None]
    a, a_dot = _layer(x, x_dot, gamma, beta, at, inside, H, EPS, NORM, TANGENT)
    to = e + g * T * E
    tl.store(out + to[:, None] * H + c[None, :], a, mask=both)
    if TANGENT:
        tl.store(out + (to + E)[:, None] * H + c[None, :], a_dot, mask=both)


@triton.jit
def first_layer_reverse_kernel(
    grad, distance, distance_dot, target_species, source_species, knots, slopes, target_embedding, source_embedding,
    gamma, beta, out, grad_distance, grad_distance_dot, sums, E, G, H, intervals, scale, tiles,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, SPLINE: tl.constexpr,
    TANGENT: tl.constexpr, WEIGHTS: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """From the gradient of first_layer_kernel's result to those by distance and distance_dot, [G, E] each.

    STORE: out[g, 0, e] is the gradient by x = W0 phi(d) + ..., out[g, 1, e] that by its slope W0 phi'(d).
    WEIGHTS: sums[program] = [by gamma, by beta], [G, h] each, of the ``tiles`` tiles of the program; a row of ``sums``
    has SUMS [G, h].
    """
    g = tl.program_id(1)
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    T: tl.constexpr = 2 if TANGENT else 1
    if WEIGHTS:
        sum_gamma = tl.zeros([BE, HP], dtype=grad.dtype.element_ty)
        sum_beta = tl.zeros([BE, HP], dtype=grad.dtype.element_ty)
    for k in range(tiles):
        e = (tl.program_id(0).to(tl.int64) * tiles + k) * BE + tl.arange(0, BE)
        in_e = e < E
        both = in_e[:, None] & inside[None, :]
        d = tl.load(distance + e, mask=in_e, other=0.0)
        zt = tl.load(target_species + e, mask=in_e, other=0)
        zs = tl.load(source_species + e, mask=in_e, other=0)
        x = _first_layer(
            d,
            e,
            in_e,
            zt,
            zs,
            knots,
            target_embedding,
            source_embedding,
            at,
            inside,
            E,
            G,
            H,
            intervals,
            scale,
            g,
            SPLINE,
        )
        row = (g * E + e)[:, None] * H + c[None, :]
        slope = _slope(d, row, both, knots, slopes, at, inside, G, H, intervals, scale, SPLINE)
        to = (e + g * T * E)[:, None] * H + c[None, :]
        q = tl.load(grad + to, mask=both, other=0.0)
        x_dot = slope
        q_dot = q
        if TANGENT:
            to_dot = (e + g * T * E + E)[:, None] * H + c[None, :]
            q_dot = tl.load(grad + to_dot, mask=both, other=0.0)
            d_dot = tl.load(distance_dot + e, mask=in_e, other=0.0)
            x_dot = slope * d_dot[:, None]
        q, q_dot, to_gamma, to_beta = _layer_backward(
            q, q_dot, x, x_dot, gamma, beta, at, inside, H, EPS, NORM, TANGENT
        )
        tl.store(grad_distance + g * E + e, tl.sum(q * slope, axis=1), mask=in_e)
        if STORE:
            tl.store(out + to, q, mask=both)
        if TANGENT:
            tl.store(grad_distance_dot + g * E + e, tl.sum(q_dot * slope, axis=1), mask=in_e)
            if STORE:
                tl.store(out + to_dot, q_dot * d_dot[:, None], mask=both)
        if WEIGHTS:
            # rows beyond E have no gradient, but normals of their own
            sum_gamma += tl.where(both, to_gamma, 0.0)
            sum_beta += tl.where(both, to_beta, 0.0)
    if WEIGHTS:
        to = sums + tl.program_id(0).to(tl.int64) * SUMS * G * H + at
        tl.store(to, tl.sum(sum_gamma, axis=0), mask=inside)
        tl.store(to + G * H, tl.sum(sum_beta, axis=0), mask=inside)


@triton.jit
def layer_kernel(
    x, bias, gamma, beta, out, E, G, H,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, EDGE_MAJOR: tl.constexpr,
    TANGENT: tl.constexpr,
):  # fmt: skip
    """SiLU(LN(x + b1)) and its tangent. x: [G, T, E, h]; out: [G, T, E, h], or [T, E, G, h] with EDGE_MAJOR."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    g = tl.program_id(1)
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    both = (e < E)[:, None] & inside[None, :]
    T: tl.constexpr = 2 if TANGENT else 1
    row = e + g * T * E
    y = tl.load(x + row[:, None] * H + c[None, :], mask=both, other=0.0)
    y += tl.load(bias + at, mask=inside, other=0.0)[None, :]
    y_dot = y
    if TANGENT:
        y_dot = tl.load(x + (row + E)[:, None] * H + c[None, :], mask=both, other=0.0)
    a, a_dot = _layer(y, y_dot, gamma, beta, at, inside, H, EPS, NORM, TANGENT)
    if EDGE_MAJOR:
        tl.store(out + e[:, None] * (G * H) + at[None, :], a, mask=both)
        if TANGENT:
            tl.store(out + (e + E)[:, None] * (G * H) + at[None, :], a_dot, mask=both)
    else:
        tl.store(out + row[:, None] * H + c[None, :], a, mask=both)
        if TANGENT:
            tl.store(out + (row + E)[:, None] * H + c[None, :], a_dot, mask=both)


@triton.jit
def layer_reverse_kernel(
    grad, x, bias, gamma, beta, out, sums, E, G, H, tiles,
    EPS: tl.constexpr, HP: tl.constexpr, BE: tl.constexpr, NORM: tl.constexpr, EDGE_MAJOR: tl.constexpr,
    TANGENT: tl.constexpr, WEIGHTS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Gradient of layer_kernel by x, [G, T, E, h]. grad: as the result of layer_kernel.

    WEIGHTS: sums[program] = [by gamma, by beta, by b1], [G, h] each, of the ``tiles`` tiles of the program; a row of
    ``sums`` has SUMS [G, h].
    """
    g = tl.program_id(1)
    c = tl.arange(0, HP)
    inside = c < H
    at = g * H + c
    T: tl.constexpr = 2 if TANGENT else 1
    if WEIGHTS:
        sum_gamma = tl.zeros([BE, HP], dtype=grad.dtype.element_ty)
        sum_beta = tl.zeros([BE, HP], dtype=grad.dtype.element_ty)
        sum_bias = tl.zeros([BE, HP], dtype=grad.dtype.element_ty)
    for k in range(tiles):
        e = (tl.program_id(0).to(tl.int64) * tiles + k) * BE + tl.arange(0, BE)
        both = (e < E)[:, None] & inside[None, :]
        row = e + g * T * E
        at_row = row[:, None] * H + c[None, :]
        y = tl.load(x + at_row, mask=both, other=0.0) + tl.load(bias + at, mask=inside, other=0.0)[None, :]
        if EDGE_MAJOR:
            q = tl.load(grad + e[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
        else:
            q = tl.load(grad + at_row, mask=both, other=0.0)
        y_dot = y
        q_dot = q
        if TANGENT:
            at_dot = (row + E)[:, None] * H + c[None, :]
            y_dot = tl.load(x + at_dot, mask=both, other=0.0)
            if EDGE_MAJOR:
                q_dot = tl.load(grad + (e + E)[:, None] * (G * H) + at[None, :], mask=both, other=0.0)
            else:
                q_dot = tl.load(grad + at_dot, mask=both, other=0.0)
        q, q_dot, to_gamma, to_beta = _layer_backward(
            q, q_dot, y, y_dot, gamma, beta, at, inside, H, EPS, NORM, TANGENT
        )
        tl.store(out + at_row, q, mask=both)
        if TANGENT:
            tl.store(out + at_dot, q_dot, mask=both)
        if WEIGHTS:
            sum_gamma += tl.where(both, to_gamma, 0.0)
            sum_beta += tl.where(both, to_beta, 0.0)
            sum_bias += tl.where(both, q, 0.0)
    if WEIGHTS:
        to = sums + tl.program_id(0).to(tl.int64) * SUMS * G * H + at
        tl.store(to, tl.sum(sum_gamma, axis=0), mask=inside)
        tl.store(to + G * H, tl.sum(sum_beta, axis=0), mask=inside)
        tl.store(to + 2 * G * H, tl.sum(sum_bias, axis=0), mask=inside)


@triton.jit
def inputs_kernel(
    distance, target_species, source_species, inputs, slopes, E, NB, Z, W, spacing,
    BE: tl.constexpr, BW: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """What the first layer reads, [phi(d); one-hot z_i; one-hot z_j; zeros], [E, W]. TANGENT: slopes = phi'(d) [E, NB].

    Z: rows of the embeddings by element.
    """
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    c = tl.program_id(1) * BW + tl.arange(0, BW)
    in_e = e < E
    d = tl.load(distance + e, mask=in_e, other=0.0)
    zt = tl.load(target_species + e, mask=in_e, other=0)
    zs = tl.load(source_species + e, mask=in_e, other=0)
    t = (d[:, None] - c[None, :].to(d.dtype) * spacing) * (0.5 / spacing)
    phi = tl.exp(-0.5 * t * t)
    one = (c[None, :] == NB + zt[:, None]) | (c[None, :] == NB + Z + zs[:, None])
    x = tl.where((c < NB)[None, :], phi, one.to(d.dtype))
    tl.store(inputs + e[:, None] * W + c[None, :], x, mask=in_e[:, None] & (c < W)[None, :])
    if TANGENT:
        y = phi * t * (-0.5 / spacing)
        tl.store(slopes + e[:, None] * NB + c[None, :], y, mask=in_e[:, None] & (c < NB)[None, :])


@triton.jit
def curvature_kernel(x, distance, out, E, NB, spacing, BE: tl.constexpr, BW: tl.constexpr):
    """out[e] += sum over k of x[e, k] phi_k''(d). x: [E, NB]. BW covers all columns."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    c = tl.arange(0, BW)
    in_e = e < E
    d = tl.load(distance + e, mask=in_e, other=0.0)
    t = (d[:, None] - c[None, :].to(d.dtype) * spacing) * (0.5 / spacing)
    bend = (t * t - 1.0) * tl.exp(-0.5 * t * t) * (0.25 / (spacing * spacing))
    values = tl.load(x + e[:, None] * NB + c[None, :], mask=in_e[:, None] & (c < NB)[None, :], other=0.0)
    tl.store(out + e, tl.load(out + e, mask=in_e, other=0.0) + tl.sum(values * bend, axis=1), mask=in_e)
