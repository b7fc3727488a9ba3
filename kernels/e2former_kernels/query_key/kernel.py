"""Triton kernels between the matrix products of the invariants."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def invariants_kernel(both, bias, out, N, G, D: tl.constexpr, BG: tl.constexpr):
    """s[n, l, g] = sum over m of degree l of (P[m, n, g] + delta_l0 b[g]) P[m, n, G + g]; both = P, [M, N, 2 G].

    out: [2, N, D, W], the first half of the columns g (query) before the second (key).
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = g < G
    step = N.to(tl.int64) * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    half = g // width
    column = (half * N.to(tl.int64) + n) * D * width + g - half * width
    for l in tl.static_range(D):
        total = tl.zeros([BG], dtype=out.dtype.element_ty)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * step + n * 2 * G + g
            first = tl.load(at, mask=inside, other=0.0)
            if l == 0:
                first += b
            total += first * tl.load(at + G, mask=inside, other=0.0)
        tl.store(out + column + l * width, total, mask=inside)


@triton.jit
def invariants_backward_kernel(both, bias, grad, N, G, D: tl.constexpr, BG: tl.constexpr):
    """In place: P becomes the gradient by P. grad: as the output of invariants_kernel."""
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = g < G
    step = N.to(tl.int64) * 2 * G
    b = tl.load(bias + g, mask=inside, other=0.0)
    width = G // 2
    half = g // width
    column = (half * N.to(tl.int64) + n) * D * width + g - half * width
    for l in tl.static_range(D):
        s = tl.load(grad + column + l * width, mask=inside, other=0.0)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = both + m * step + n * 2 * G + g
            first = tl.load(at, mask=inside, other=0.0)
            if l == 0:
                first += b
            second = tl.load(at + G, mask=inside, other=0.0)
            tl.store(at, s * second, mask=inside)
            tl.store(at + G, s * first, mask=inside)
