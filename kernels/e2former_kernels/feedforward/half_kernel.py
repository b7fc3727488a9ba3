"""Triton kernels between the float16 products of the gated feed-forward network, for frozen weights.

A product is a number times the factor of its node and that of its weight (``common/half.py``). Every kernel goes over a
node twice, first for the largest result, then to store float16 rows of at most 1: the second time from a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_gate_kernel(
    y, gates, factors, degrees, gate_factor, gate_bias, out, out_factor, C, SILU, SIGMOID,
    D: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows out [N, M, C] with factors [N]: SiLU of gate 0, then the rows of degree l times the sigmoid of gate l.

    y: [N, M-1, C], products of the rows behind row 0, and gates [N, D, C], both with factors [N]; degrees: [D],
    gate_factor: [1], factors of their weights; gate_bias: [D, C].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < C
    of_node = tl.load(factors + n)
    of_gate = of_node * tl.load(gate_factor)
    top = tl.zeros([BC], dtype=tl.float32)
    inverse = 1.0
    for storing in tl.static_range(2):
        for l in tl.static_range(D):
            a = tl.load(gates + (n * D + l) * C + c, mask=inside, other=0.0).to(tl.float32) * of_gate
            a += tl.load(gate_bias + l * C + c, mask=inside, other=0.0)
            s = 1.0 / (1.0 + tl.exp(-a))
            if l == 0:
                z = SILU * a * s
                if storing:
                    tl.store(out + n * D * D * C + c, (z * inverse).to(tl.float16), mask=inside)
                else:
                    top = tl.maximum(top, tl.abs(z))
            else:
                gate = SIGMOID * s * of_node * tl.load(degrees + l)
                for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                    z = gate * tl.load(y + (n * (D * D - 1) + m - 1) * C + c, mask=inside, other=0.0).to(tl.float32)
                    if storing:
                        tl.store(out + (n * D * D + m) * C + c, (z * inverse).to(tl.float16), mask=inside)
                    else:
                        top = tl.maximum(top, tl.abs(z))
        if storing == 0:
            largest = tl.max(top, axis=0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            tl.store(out_factor + n, largest)
            inverse = 1.0 / largest


@triton.jit
def half_gate_backward_kernel(
    grad, grad_factor, grad_degrees, y, gates, factors, degrees, gate_factor, gate_bias, out_factor, C, SILU, SIGMOID,
    D: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """In place: y and gates become their own gradients, as rows of a common factor out_factor [N].

    grad: [N, M, C], that by half_gate_kernel's result, products with factors grad_factor [N] and grad_degrees [D].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < C
    of_node = tl.load(factors + n)
    of_gate = of_node * tl.load(gate_factor)
    of_grad = tl.load(grad_factor + n)
    top = tl.zeros([BC], dtype=tl.float32)
    inverse = 1.0
    for storing in tl.static_range(2):
        for l in tl.static_range(D):
            at_gate = gates + (n * D + l) * C + c
            a = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32) * of_gate
            a += tl.load(gate_bias + l * C + c, mask=inside, other=0.0)
            s = 1.0 / (1.0 + tl.exp(-a))
            of_degree = of_grad * tl.load(grad_degrees + l)
            if l == 0:
                g = tl.load(grad + n * D * D * C + c, mask=inside, other=0.0).to(tl.float32) * of_degree
                by_gate = g * SILU * s * (1.0 + a * (1.0 - s))
            else:
                by_gate = tl.zeros([BC], dtype=tl.float32)
                of_y = of_node * tl.load(degrees + l)
                for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                    at = y + (n * (D * D - 1) + m - 1) * C + c
                    g = tl.load(grad + (n * D * D + m) * C + c, mask=inside, other=0.0).to(tl.float32) * of_degree
                    by_gate += g * tl.load(at, mask=inside, other=0.0).to(tl.float32) * of_y
                    by_y = g * SIGMOID * s
                    if storing:
                        tl.store(at, (by_y * inverse).to(tl.float16), mask=inside)
                    else:
                        top = tl.maximum(top, tl.abs(by_y))
                by_gate *= SIGMOID * s * (1.0 - s)
            if storing:
                tl.store(at_gate, (by_gate * inverse).to(tl.float16), mask=inside)
            else:
                top = tl.maximum(top, tl.abs(tl.where(inside, by_gate, 0.0)))
        if storing == 0:
            largest = tl.max(top, axis=0)
            largest = tl.where(largest > 0.0, largest, 1.0)
            tl.store(out_factor + n, largest)
            inverse = 1.0 / largest
