"""Triton kernels between the matrix products of the invariants.

With TANGENT they take along the derivative of everything in a given direction of h (T = 2: value, tangent), else T = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])  # a run of one node would make N a constant, which has no .to
def invariants_kernel(
    both, bias, out, N, G, D: tl.constexpr, BG: tl.constexpr, TANGENT: tl.constexpr
):  # fmt: skip
    """s[n, l, g] = sum over m of degree l of (P[m, n, g] + delta_l0 b[g]) P[m, n, G + g], and its tangent.

    both: P, [T, M, N, 2 G]; out: [2, T, N, D, W], the first half of the columns g (query) before the second (key).
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = g < G
    step = N.to(tl.int64) * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    half = g // width
    T = 1
    if TANGENT:
        T = 2
    column = (half * T * N.to(tl.int64) + n) * D * width + g - half * width
    for l in tl.static_range(D):
        total = tl.zeros([BG], dtype=out.dtype.element_ty)
        total_dot = tl.zeros([BG], dtype=out.dtype.element_ty)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * step + n * 2 * G + g
            first = tl.load(at, mask=inside, other=0.0)
            second = tl.load(at + G, mask=inside, other=0.0)
            if l == 0:
                first += b
            total += first * second
            if TANGENT:
                at += D * D * step
                total_dot += tl.load(at, mask=inside, other=0.0) * second
                total_dot += first * tl.load(at + G, mask=inside, other=0.0)
        tl.store(out + column + l * width, total, mask=inside)
        if TANGENT:
            tl.store(out + column + (N.to(tl.int64) * D + l) * width, total_dot, mask=inside)


@triton.jit(do_not_specialize=["N"])  # a run of one node would make N a constant, which has no .to
def invariants_backward_kernel(
    both, bias, grad, N, G, D: tl.constexpr, BG: tl.constexpr, TANGENT: tl.constexpr, WEIGHTS: tl.constexpr
):  # fmt: skip
    """In place: P becomes the gradient by P. both, grad: as input and output of invariants_kernel.

    Without WEIGHTS the tangent's part of P, which then nobody needs the gradient of, stays.
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = g < G
    step = N.to(tl.int64) * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    half = g // width
    T = 1
    if TANGENT:
        T = 2
    column = (half * T * N.to(tl.int64) + n) * D * width + g - half * width
    for l in tl.static_range(D):
        s = tl.load(grad + column + l * width, mask=inside, other=0.0)
        if TANGENT:
            s_dot = tl.load(grad + column + (N.to(tl.int64) * D + l) * width, mask=inside, other=0.0)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * step + n * 2 * G + g
            first = tl.load(at, mask=inside, other=0.0)
            second = tl.load(at + G, mask=inside, other=0.0)
            if l == 0:
                first += b
            to_first = s * second
            to_second = s * first
            if TANGENT:
                at_dot = at + D * D * step
                to_first += s_dot * tl.load(at_dot + G, mask=inside, other=0.0)
                to_second += s_dot * tl.load(at_dot, mask=inside, other=0.0)
                if WEIGHTS:
                    tl.store(at_dot, s_dot * second, mask=inside)
                    tl.store(at_dot + G, s_dot * first, mask=inside)
            tl.store(at, to_first, mask=inside)
            tl.store(at + G, to_second, mask=inside)
