"""Triton kernels between the matrix products of the gated feed-forward network."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_kernel(y, gates, C, SILU, SIGMOID, D: tl.constexpr, BC: tl.constexpr):
    """In place: row 0 of y becomes SiLU of gate 0, a row of degree l is multiplied by the sigmoid of gate l."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    a = tl.load(gates + n * D * C + c, mask=inside, other=0.0)
    tl.store(y + n * D * D * C + c, SILU * a / (1.0 + tl.exp(-a)), mask=inside)
    for l in tl.static_range(1, D):
        a = tl.load(gates + (n * D + l) * C + c, mask=inside, other=0.0)
        gate = SIGMOID / (1.0 + tl.exp(-a))
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = y + (n * D * D + m) * C + c
            tl.store(at, gate * tl.load(at, mask=inside, other=0.0), mask=inside)


@triton.jit
def gate_backward_kernel(grad, y, gates, C, SILU, SIGMOID, D: tl.constexpr, BC: tl.constexpr):
    """In place: grad by z becomes the gradient by y (row 0: zero), gates become their own gradient."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    a = tl.load(gates + n * D * C + c, mask=inside, other=0.0)
    s = 1.0 / (1.0 + tl.exp(-a))
    g = tl.load(grad + n * D * D * C + c, mask=inside, other=0.0)
    tl.store(gates + n * D * C + c, g * SILU * s * (1.0 + a * (1.0 - s)), mask=inside)
    for l in tl.static_range(1, D):
        at_gate = gates + (n * D + l) * C + c
        s = 1.0 / (1.0 + tl.exp(-tl.load(at_gate, mask=inside, other=0.0)))
        total = tl.zeros([BC], dtype=grad.dtype.element_ty)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = (n * D * D + m) * C + c
            g = tl.load(grad + at, mask=inside, other=0.0)
            total += g * tl.load(y + at, mask=inside, other=0.0)
            tl.store(grad + at, g * SIGMOID * s, mask=inside)
        tl.store(at_gate, total * SIGMOID * s * (1.0 - s), mask=inside)
