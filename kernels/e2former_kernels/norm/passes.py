"""The norm with its change along a direction, and gradients of both, without a graph.

With c the cotangent of the gradient by x, the second derivative is that of <c, gradient> = <grad, change along c>.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from e2former_kernels.common.degree_sums import degree_sums
from e2former_kernels.common.half import Rows, new_rows
from e2former_kernels.common.tiles import next_power
from e2former_kernels.norm.half_kernel import norm_rows_kernel, norm_rows_reverse_kernel
from e2former_kernels.norm.kernel import norm_kernel, norm_reverse_kernel, norm_tangent_kernel
from e2former_kernels.norm.reference import NORM_EPS

MAX_PROGRAMS = 1024  # programs that write partial sums of the gradient by the weight


def _constants(x: Tensor, weight: Tensor) -> dict:
    _, rows, channels = x.shape
    numbers = next_power(rows) * next_power(channels)
    return {
        "M": rows, "C": channels, "L": weight.shape[0], "EPS": NORM_EPS, "BM": next_power(rows),
        "BC": next_power(channels), "num_warps": 8 if numbers > 4096 else 4,
    }  # fmt: skip


def launch_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> Tensor:
    """The norm, without a graph. x: [N, M, C], contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        norm_kernel[(x.shape[0],)](
            x, weight.contiguous(), bias.contiguous(), x if shift is None else shift.contiguous(), out,
            SHIFT=shift is not None, **_constants(x, weight),
        )  # fmt: skip
    return out


def launch_norm_tangent(
    x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The norm (where ``bias`` is given) and its change along x_dot, plus ``shift`` [N, C] in row 0 of the change.

    x, x_dot: [N, M, C], contiguous.
    """
    out_dot = torch.empty_like(x)
    out = out_dot if bias is None else torch.empty_like(x)
    if x.numel():
        norm_tangent_kernel[(x.shape[0],)](
            x, x_dot, weight.contiguous(), weight if bias is None else bias.contiguous(),
            x if shift is None else shift.contiguous(), out, out_dot, VALUE=bias is not None,
            SHIFT=shift is not None, **_constants(x, weight),
        )  # fmt: skip
    return out, out_dot


def launch_norm_reverse(
    x: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    x_dot: Tensor | None = None,
    grad_dot: Tensor | None = None,
    by_weight: bool = False,
    out: Tensor | None = None,
    parts: bool = False,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of <grad, norm> + <grad_dot, change of the norm along x_dot> by x [N, M, C], and by the weight [L, C].

    All contiguous; ``grad`` or the pair may be missing. parts: partial sums of the latter instead, [programs, M, C].
    beside: [N, M, C], added to the former.
    """
    nodes = x.shape[0]
    out = torch.empty_like(x) if out is None else out
    steps = triton.cdiv(nodes, MAX_PROGRAMS) if by_weight else 1
    programs = triton.cdiv(nodes, steps) if nodes else 0
    constants = _constants(x, weight)
    if grad_dot is not None:
        constants["num_warps"] = 8  # four spill: there are five tiles of [M, C] at a time
    sums = x.new_empty(programs, *x.shape[1:]) if by_weight else x
    if programs:
        norm_reverse_kernel[(programs,)](
            x if grad is None else grad, x if grad_dot is None else grad_dot, x,
            x if x_dot is None else x_dot, weight.contiguous(), x if beside is None else beside, out, sums, N=nodes,
            steps=steps, VALUE=grad is not None, TANGENT=grad_dot is not None, WEIGHTS=by_weight,
            BESIDE=beside is not None, **constants,
        )  # fmt: skip
    if not by_weight or parts:
        return out, sums if by_weight else None
    return out, degree_sums(sums.sum(0))


def launch_norm_rows(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Rows:
    """The norm of x [N, M, C], contiguous, as float16 rows with a factor per node."""
    rows = new_rows(x, *x.shape)
    if x.numel():
        norm_rows_kernel[(x.shape[0],)](
            x, weight.contiguous(), bias.contiguous(), x if shift is None else shift.contiguous(), *rows,
            SHIFT=shift is not None, **_constants(x, weight),
        )  # fmt: skip
    return rows


def launch_norm_rows_reverse(
    x: Tensor,
    weight: Tensor,
    grad: Rows,
    row_factors: Tensor,
    beside: Tensor | None,
    out: Tensor,
    more: tuple[Rows, Tensor] | None = None,
) -> Tensor:
    """Gradient by x of <grad, norm>, plus ``beside``, into out; all [N, M, C], contiguous. row_factors: [M].

    more: a second term of grad, with its row_factors.
    """
    if x.numel():
        further, factors = (grad, row_factors) if more is None else more
        norm_rows_reverse_kernel[(x.shape[0],)](
            *grad, row_factors, *further, factors, x if beside is None else beside, x, weight.contiguous(), out,
            MORE=more is not None, BESIDE=beside is not None, **_constants(x, weight),
        )  # fmt: skip
    return out
