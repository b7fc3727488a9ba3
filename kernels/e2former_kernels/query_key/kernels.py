"""Triton kernels between the matrix products of the invariants, in float32 and with float16 products.

With TANGENT they take along the derivative of everything in a given direction of h (T = 2: value, tangent), else T = 1.
The half kernels read products of float16 rows and write such rows with their factors (``common/half.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from e2former_kernels.common.half import factor_of, load_numbers, store_numbers


@triton.jit(do_not_specialize=["N"])  # a chunk of one node would make N a constant, which has no .to
def invariants_kernel(both, bias, out, N, G, D: tl.constexpr, BG: tl.constexpr, TANGENT: tl.constexpr):
    """s[n, l, g] = sum over m of degree l of (P[m, n, g] + delta_l0 b[g]) P[m, n, G + g], and its tangent.

    both: P, [T, M, N, 2 G]; out: [2, T, N, D, W], the columns g of the query before those of the key.
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = g < G
    stride = N.to(tl.int64) * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    which = g // width
    T: tl.constexpr = 2 if TANGENT else 1
    column = (which * T * N.to(tl.int64) + n) * D * width + g - which * width
    for l in tl.static_range(D):
        total = tl.zeros([BG], dtype=out.dtype.element_ty)
        total_dot = tl.zeros([BG], dtype=out.dtype.element_ty)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * stride + n * 2 * G + g
            left = tl.load(at, mask=inside, other=0.0)
            right = tl.load(at + G, mask=inside, other=0.0)
            if l == 0:
                left += b
            total += left * right
            if TANGENT:
                at += D * D * stride
                total_dot += tl.load(at, mask=inside, other=0.0) * right
                total_dot += left * tl.load(at + G, mask=inside, other=0.0)
        tl.store(out + column + l * width, total, mask=inside)
        if TANGENT:
            tl.store(out + column + (N.to(tl.int64) * D + l) * width, total_dot, mask=inside)


@triton.jit(do_not_specialize=["N"])  # a chunk of one node would make N a constant, which has no .to
def invariants_backward_kernel(
    both, bias, grad, N, G, D: tl.constexpr, BG: tl.constexpr, TANGENT: tl.constexpr, WEIGHTS: tl.constexpr
):
    """In place: P becomes the gradient by P. both, grad: as input and output of invariants_kernel.

    Without WEIGHTS the tangent's part of P, which then nobody needs the gradient of, stays.
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = g < G
    stride = N.to(tl.int64) * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    which = g // width
    T: tl.constexpr = 2 if TANGENT else 1
    column = (which * T * N.to(tl.int64) + n) * D * width + g - which * width
    for l in tl.static_range(D):
        s = tl.load(grad + column + l * width, mask=inside, other=0.0)
        if TANGENT:
            s_dot = tl.load(grad + column + (N.to(tl.int64) * D + l) * width, mask=inside, other=0.0)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * stride + n * 2 * G + g
            left = tl.load(at, mask=inside, other=0.0)
            right = tl.load(at + G, mask=inside, other=0.0)
            if l == 0:
                left += b
            to_left = s * right
            to_right = s * left
            if TANGENT:
                at_dot = at + D * D * stride
                to_left += s_dot * tl.load(at_dot + G, mask=inside, other=0.0)
                to_right += s_dot * tl.load(at_dot, mask=inside, other=0.0)
                if WEIGHTS:
                    tl.store(at_dot, s_dot * right, mask=inside)
                    tl.store(at_dot + G, s_dot * left, mask=inside)
            tl.store(at, to_left, mask=inside)
            tl.store(at + G, to_right, mask=inside)


@triton.jit
def _degree_sum(both, g, inside, b, stride, G, factor, L: tl.constexpr):
    """Sum over the orders of degree L of the products of both factors."""
    total = 0.0 * b
    for m in tl.static_range(L * L, (L + 1) * (L + 1)):
        left = load_numbers(both + m * stride + g, inside) * factor
        right = load_numbers(both + m * stride + G + g, inside) * factor
        if L == 0:
            left += b
        total += left * right
    return total


@triton.jit(do_not_specialize=["N"])  # a chunk of one node would make N a constant, which has no .to
def half_invariants_kernel(both, bias, out, out_factor, rows, degrees, N, G, D: tl.constexpr, BG: tl.constexpr):
    """s[n, l, g] of one node as in invariants_kernel, as rows out [2, N, D, W] (query, key), and factors [2, N].

    Sums are made twice, to know the largest before any is stored: then P comes from a cache.
    """
    n = tl.program_id(0).to(tl.int64)
    nodes = N.to(tl.int64)
    g = tl.arange(0, BG)
    inside = g < G
    stride = nodes * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    of_key = g >= width
    row = tl.load(rows + n)
    at = both + n * 2 * G
    top = 0.0 * b
    for l in tl.static_range(D):
        top = tl.maximum(top, tl.abs(_degree_sum(at, g, inside, b, stride, G, row * tl.load(degrees + l), l)))
    query_top = factor_of(tl.max(tl.where(of_key, 0.0, top), axis=0))
    key_top = factor_of(tl.max(tl.where(of_key, top, 0.0), axis=0))
    tl.store(out_factor + n, query_top)
    tl.store(out_factor + nodes + n, key_top)
    inverse = 1.0 / tl.where(of_key, key_top, query_top)
    to = out + tl.where(of_key, (nodes + n) * D * width + g - width, n * D * width + g)
    for l in tl.static_range(D):
        total = _degree_sum(at, g, inside, b, stride, G, row * tl.load(degrees + l), l)
        store_numbers(to + l * width, total * inverse, inside)


@triton.jit(do_not_specialize=["N"])
def half_invariants_backward_kernel(
    both, bias, grad, grad_factor, weights, rows, degrees, largest, bounds, N, G, smallest,
    D: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """In place: P becomes the gradient by P over bounds[n], the largest that it can be.

    grad: [2, N, D, W], products with factors grad_factor [2, N] and weights [2]. largest: two numbers a, b; products of
    a node are at most a rows[n] + b.
    """
    n = tl.program_id(0).to(tl.int64)
    nodes = N.to(tl.int64)
    g = tl.arange(0, BG)
    inside = g < G
    stride = nodes * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    of_key = g >= width
    row = tl.load(rows + n)
    by_query = tl.load(grad_factor + n) * tl.load(weights)
    by_key = tl.load(grad_factor + nodes + n) * tl.load(weights + 1)
    scale = tl.where(of_key, by_key, by_query)
    column = grad + tl.where(of_key, (nodes + n) * D * width + g - width, n * D * width + g)
    top = 0.0 * b
    for l in tl.static_range(D):
        top = tl.maximum(top, tl.abs(load_numbers(column + l * width, inside) * scale))
    bound = tl.max(top, axis=0) * (tl.load(largest) * row + tl.load(largest + 1))
    bound = tl.maximum(bound, smallest)
    tl.store(bounds + n, bound)
    inverse = 1.0 / bound
    for l in tl.static_range(D):
        factor = row * tl.load(degrees + l)
        # over the bound first: that is finite where products of large numbers are not
        s = load_numbers(column + l * width, inside) * scale * inverse
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * stride + n * 2 * G + g
            left = load_numbers(at, inside) * factor
            right = load_numbers(at + G, inside) * factor
            if l == 0:
                left += b
            store_numbers(at, s * right, inside)
            store_numbers(at + G, s * left, inside)


@triton.jit
def _normal(x, x_factor, weights, bias, norm_weight, norm_bias, n, c, group, first, N, W, EPS: tl.constexpr):
    """LayerNorm of rows n of a group's products without and with its affine map, the inverse deviation, and gamma."""
    here = (n[:, None] < N) & (c[None, :] < W)
    inside = c < W
    factor = tl.load(x_factor + first + n, mask=n < N, other=0.0) * tl.load(weights + group)
    at = x + first * W + n[:, None] * W + c[None, :]
    v = load_numbers(at, here) * factor[:, None]
    v = tl.where(here, v + tl.load(bias + group * W + c, mask=inside, other=0.0)[None, :], 0.0)
    v = tl.where(here, v - (tl.sum(v, axis=1) / W)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / W + EPS)
    normal = v * inverse[:, None]
    gamma = tl.load(norm_weight + group * W + c, mask=inside, other=0.0)[None, :]
    t = normal * gamma + tl.load(norm_bias + group * W + c, mask=inside, other=0.0)[None, :]
    return normal, t, inverse, gamma


@triton.jit
def _store_rows(y, out, out_factor, n, c, W, E):
    """Rows as float16 with their factor."""
    top = factor_of(tl.max(tl.abs(y), axis=1))
    here = (n[:, None] < E) & (c[None, :] < W)
    store_numbers(out + n[:, None] * W + c[None, :], y / top[:, None], here)
    tl.store(out_factor + n, top, mask=n < E)


@triton.jit
def half_layer_kernel(
    x, x_factor, weights, bias, norm_weight, norm_bias, out, out_factor, N, W,
    EPS: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """SiLU(LN(x + b)) of products x [2, N, W] with factors x_factor [2, N] and weights [2]; rows out with factors."""
    group = tl.program_id(1)
    n = (tl.program_id(0) * BE + tl.arange(0, BE)).to(tl.int64)
    c = tl.arange(0, BW)
    first = group.to(tl.int64) * N
    _, t, _, _ = _normal(x, x_factor, weights, bias, norm_weight, norm_bias, n, c, group, first, N, W, EPS)
    y = t / (1.0 + tl.exp(-t))
    _store_rows(y, out + first * W, out_factor + first, n, c, W, N)


@triton.jit
def half_layer_backward_kernel(
    grad, grad_factor, grad_weights, x, x_factor, weights, bias, norm_weight, norm_bias, out, out_factor, N, W,
    EPS: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradient by x of half_layer_kernel's result, as rows with factors; grad: products, with factors as x has."""
    group = tl.program_id(1)
    n = (tl.program_id(0) * BE + tl.arange(0, BE)).to(tl.int64)
    c = tl.arange(0, BW)
    first = group.to(tl.int64) * N
    normal, t, inverse, gamma = _normal(
        x, x_factor, weights, bias, norm_weight, norm_bias, n, c, group, first, N, W, EPS
    )
    sigmoid = 1.0 / (1.0 + tl.exp(-t))
    at = n[:, None] * W + c[None, :]
    here = (n[:, None] < N) & (c[None, :] < W)
    a = load_numbers(grad + first * W + at, here)
    a *= (tl.load(grad_factor + first + n, mask=n < N, other=0.0) * tl.load(grad_weights + group))[:, None]
    a *= sigmoid * (1.0 + t * (1.0 - sigmoid)) * gamma
    a -= (tl.sum(a, axis=1) / W)[:, None] + normal * (tl.sum(a * normal, axis=1) / W)[:, None]
    y = tl.where(here, a * inverse[:, None], 0.0)
    _store_rows(y, out + first * W, out_factor + first, n, c, W, N)
