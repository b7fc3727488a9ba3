"""Power spectrum of normalised rows with Triton: value, change and reverse, in float32 and with float16 rows.

docs/network.md, equation 7.3.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.half import Rows
from e2former_kernels.common.tiles import next_power


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
