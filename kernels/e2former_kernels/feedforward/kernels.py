"""Triton kernels of the gates and of the power spectrum: value, reverse and both with a change.

docs/network.md, equations 7.2 and 7.3; in float32 and with float16 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.half import Rows, factor_of, load_numbers, store_numbers
from e2former_kernels.common.tiles import next_power


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


@triton.jit
def gate_change_kernel(
    y, y_dot, gates, gates_dot, out, C, SILU, SIGMOID, D: tl.constexpr, BC: tl.constexpr, TANGENT: tl.constexpr
):
    """out = the result of gate_kernel, or with TANGENT its change along y_dot and gates_dot."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    for l in tl.static_range(D):
        at_gate = (n * D + l) * C + c
        a = tl.load(gates + at_gate, mask=inside, other=0.0)
        s = 1.0 / (1.0 + tl.exp(-a))
        a_dot = a
        if TANGENT:
            a_dot = tl.load(gates_dot + at_gate, mask=inside, other=0.0)
        if l == 0:
            z = SILU * a * s
            if TANGENT:
                z = SILU * s * (1.0 + a * (1.0 - s)) * a_dot
            tl.store(out + n * D * D * C + c, z, mask=inside)
        else:
            for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                at = (n * D * D + m) * C + c
                z = s * tl.load(y + at, mask=inside, other=0.0)
                if TANGENT:
                    z = z * (1.0 - s) * a_dot + s * tl.load(y_dot + at, mask=inside, other=0.0)
                tl.store(out + at, SIGMOID * z, mask=inside)


@triton.jit
def gate_change_backward_kernel(grad, y, y_dot, gates, gates_dot, C, SILU, SIGMOID, D: tl.constexpr, BC: tl.constexpr):
    """From grad, the gradient by gate_change_kernel's tangent. In place, all rows but row 0:

    grad becomes the gradient by y_dot, y_dot that by y; gates and gates_dot become their own gradients.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    for l in tl.static_range(D):
        at_gate = (n * D + l) * C + c
        a = tl.load(gates + at_gate, mask=inside, other=0.0)
        a_dot = tl.load(gates_dot + at_gate, mask=inside, other=0.0)
        s = 1.0 / (1.0 + tl.exp(-a))
        slope = s * (1.0 - s)
        if l == 0:
            g = SILU * tl.load(grad + n * D * D * C + c, mask=inside, other=0.0)
            by_dot = g * (s + a * slope)
            by_gate = g * slope * (2.0 + a * (1.0 - 2.0 * s)) * a_dot
        else:
            by_dot = tl.zeros([BC], dtype=grad.dtype.element_ty)
            by_gate = tl.zeros([BC], dtype=grad.dtype.element_ty)
            for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                at = (n * D * D + m) * C + c
                g = SIGMOID * tl.load(grad + at, mask=inside, other=0.0)
                v = tl.load(y + at, mask=inside, other=0.0)
                v_dot = tl.load(y_dot + at, mask=inside, other=0.0)
                by_dot += g * slope * v
                by_gate += g * slope * (v_dot + (1.0 - 2.0 * s) * a_dot * v)
                tl.store(grad + at, g * s, mask=inside)
                tl.store(y_dot + at, g * slope * a_dot, mask=inside)
        tl.store(gates + at_gate, by_gate, mask=inside)
        tl.store(gates_dot + at_gate, by_dot, mask=inside)


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
            a = load_numbers(gates + (n * D + l) * C + c, inside) * of_gate
            a += tl.load(gate_bias + l * C + c, mask=inside, other=0.0)
            s = 1.0 / (1.0 + tl.exp(-a))
            if l == 0:
                z = SILU * a * s
                if storing:
                    store_numbers(out + n * D * D * C + c, z * inverse, inside)
                else:
                    top = tl.maximum(top, tl.abs(z))
            else:
                gate = SIGMOID * s * of_node * tl.load(degrees + l)
                for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                    z = gate * load_numbers(y + (n * (D * D - 1) + m - 1) * C + c, inside)
                    if storing:
                        store_numbers(out + (n * D * D + m) * C + c, z * inverse, inside)
                    else:
                        top = tl.maximum(top, tl.abs(z))
        if storing == 0:
            largest = factor_of(tl.max(top, axis=0))
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
            a = load_numbers(at_gate, inside) * of_gate
            a += tl.load(gate_bias + l * C + c, mask=inside, other=0.0)
            s = 1.0 / (1.0 + tl.exp(-a))
            of_degree = of_grad * tl.load(grad_degrees + l)
            if l == 0:
                g = load_numbers(grad + n * D * D * C + c, inside) * of_degree
                by_gate = g * SILU * s * (1.0 + a * (1.0 - s))
            else:
                by_gate = tl.zeros([BC], dtype=tl.float32)
                of_y = of_node * tl.load(degrees + l)
                for m in tl.static_range(l * l, (l + 1) * (l + 1)):
                    at = y + (n * (D * D - 1) + m - 1) * C + c
                    g = load_numbers(grad + (n * D * D + m) * C + c, inside) * of_degree
                    by_gate += g * load_numbers(at, inside) * of_y
                    by_y = g * SIGMOID * s
                    if storing:
                        store_numbers(at, by_y * inverse, inside)
                    else:
                        top = tl.maximum(top, tl.abs(by_y))
                by_gate *= SIGMOID * s * (1.0 - s)
            if storing:
                store_numbers(at_gate, by_gate * inverse, inside)
            else:
                top = tl.maximum(top, tl.abs(tl.where(inside, by_gate, 0.0)))
        if storing == 0:
            largest = factor_of(tl.max(top, axis=0))
            tl.store(out_factor + n, largest)
            inverse = 1.0 / largest


@triton.jit
def power_kernel(
    h, h_dot, factors, out, C, D: tl.constexpr, BC: tl.constexpr, TANGENT: tl.constexpr, HALF: tl.constexpr
):
    """out [N, (D-1) C] = mean over m of the squares of h [N, M, C], or with TANGENT its change along h_dot.

    HALF: h is rows with factors [N].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    dtype = out.dtype.element_ty
    for l in tl.static_range(1, D):
        total = tl.zeros([BC], dtype=dtype)
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = (n * D * D + m) * C + c
            v = tl.load(h + at, mask=inside, other=0.0).to(dtype)
            if TANGENT:
                total += 2.0 * v * tl.load(h_dot + at, mask=inside, other=0.0)
            else:
                total += v * v
        total = total / (2 * l + 1)
        if HALF:
            factor = tl.load(factors + n)
            total = total * factor * factor
        tl.store(out + (n * (D - 1) + l - 1) * C + c, total, mask=inside)


@triton.jit
def power_backward_kernel(
    h, h_dot, by_power, by_power_dot, by_h, by_h_dot, factors, by_factors, by_degrees, C, D: tl.constexpr,
    BC: tl.constexpr, TANGENT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """by_h += gradient through power_kernel; with TANGENT also through its change, and by_h_dot += that by h_dot.

    by_power, by_power_dot: gradients by the value and by the change, [N, (D-1) C]. HALF: h is rows with factors [N],
    by_h products with by_factors [N] and by_degrees [M].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    for l in tl.static_range(1, D):
        at_power = (n * (D - 1) + l - 1) * C + c
        g = tl.load(by_power + at_power, mask=inside, other=0.0) * 2.0 / (2 * l + 1)
        if TANGENT:
            g_dot = tl.load(by_power_dot + at_power, mask=inside, other=0.0) * 2.0 / (2 * l + 1)
        if HALF:
            g = g * tl.load(factors + n) / (tl.load(by_factors + n) * tl.load(by_degrees + l * l))
        for m in tl.static_range(l * l, (l + 1) * (l + 1)):
            at = (n * D * D + m) * C + c
            v = tl.load(h + at, mask=inside, other=0.0).to(g.dtype)
            by = tl.load(by_h + at, mask=inside, other=0.0).to(g.dtype) + g * v
            if TANGENT:
                by += g_dot * tl.load(h_dot + at, mask=inside, other=0.0)
                by_dot = tl.load(by_h_dot + at, mask=inside, other=0.0) + g_dot * v
                tl.store(by_h_dot + at, by_dot, mask=inside)
            tl.store(by_h + at, by.to(by_h.dtype.element_ty), mask=inside)


def _grid(h: Tensor) -> tuple[tuple[int, int], dict]:
    nodes, rows, channels = h.shape
    block = min(next_power(channels), 256)
    return (nodes, triton.cdiv(channels, block)), {"C": channels, "D": round(rows**0.5), "BC": block, "num_warps": 2}


def launch_power(h: Rows, h_dot: Tensor | None = None) -> Tensor:
    """The power spectrum of h [n, M, C], [n, L C], or its change along h_dot (h not float16)."""
    numbers, factor = h
    nodes, rows, channels = numbers.shape
    out = (numbers if factor is None else factor).new_empty(nodes, (round(rows**0.5) - 1) * channels)
    if out.numel():
        grid, constants = _grid(numbers)
        power_kernel[grid](
            numbers, numbers if h_dot is None else h_dot, numbers if factor is None else factor, out,
            TANGENT=h_dot is not None, HALF=factor is not None, **constants,
        )  # fmt: skip
    return out


def launch_power_backward(
    h: Rows,
    by_power: Tensor,
    by_h: Rows,
    degrees: Tensor | None = None,
    change: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """by_h [n, M, C] += gradient through the power spectrum, from that by the spectrum, [n, L C].

    change: h_dot, the gradient by the spectrum's change, and that by h_dot, to which is added. degrees: [M], with
    by_h's factor those of its products, where h is float16.
    """
    numbers, factor = h
    h_dot, by_power_dot, by_h_dot = (numbers, by_power, by_h.numbers) if change is None else change
    factors = (numbers,) * 3 if factor is None else (factor, by_h.factor, degrees)
    if numbers.numel():
        grid, constants = _grid(numbers)
        power_backward_kernel[grid](
            numbers, h_dot, by_power, by_power_dot, by_h.numbers, by_h_dot, *factors, TANGENT=change is not None,
            HALF=factor is not None, **constants,
        )  # fmt: skip
