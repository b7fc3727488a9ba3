"""Equivariant norm with Triton kernels: one pass over the features in each direction.

With c the cotangent of the gradient by x, the second derivative is that of <c, gradient> = <grad, change along c>.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.call import Change, NodeCall, apply_call
from e2former_kernels.common.checks import check_nodes
from e2former_kernels.common.half import Rows, new_rows
from e2former_kernels.common.registered import register
from e2former_kernels.common.sums import degree_sums
from e2former_kernels.common.tiles import next_power
from e2former_kernels.layer_norm import kernels as kernel
from e2former_kernels.layer_norm.reference import NORM_EPS, equivariant_rms_norm_reference

MAX_PROGRAMS = 1024  # programs that write partial sums of the gradient by the weight


def _constants(x: Tensor, weight: Tensor) -> dict:
    _, rows, channels = x.shape
    numbers = next_power(rows) * next_power(channels)
    return {
        "M": rows, "C": channels, "L": weight.shape[0], "EPS": NORM_EPS, "BM": next_power(rows),
        "BC": next_power(channels), "num_warps": 8 if numbers > 4096 else 4,
    }  # fmt: skip


def launch_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, rows: Rows | None = None) -> Tensor:
    """The norm, without a graph. x: [N, M, C], contiguous. rows: float16 with a factor per node, to which it goes."""
    out, factor = (torch.empty_like(x), x) if rows is None else rows
    if x.numel():
        kernel.norm_kernel[(x.shape[0],)](
            x, weight.contiguous(), bias.contiguous(), x if shift is None else shift.contiguous(), out, factor,
            SHIFT=shift is not None, HALF=rows is not None, **_constants(x, weight),
        )  # fmt: skip
    return out


def launch_norm_tangent(x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm (where ``bias`` is given) and its change along x_dot. x, x_dot: [N, M, C], contiguous."""
    out_dot = torch.empty_like(x)
    out = out_dot if bias is None else torch.empty_like(x)
    if x.numel():
        kernel.norm_tangent_kernel[(x.shape[0],)](
            x, x_dot, weight.contiguous(), weight if bias is None else bias.contiguous(), out, out_dot,
            VALUE=bias is not None, **_constants(x, weight),
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
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of <grad, norm> + <grad_dot, change of the norm along x_dot> by x [N, M, C], and by the weight [L, C].

    All contiguous; ``grad`` or the pair may be missing. beside: [N, M, C], added to the former.
    """
    nodes = x.shape[0]
    out = torch.empty_like(x) if out is None else out
    each = math.ceil(nodes / MAX_PROGRAMS) if by_weight else 1
    programs = math.ceil(nodes / each) if nodes else 0
    constants = _constants(x, weight)
    if grad_dot is not None:
        constants["num_warps"] = 8  # four spill: there are five tiles of [M, C] at a time
    sums = x.new_empty(programs, *x.shape[1:]) if by_weight else x
    if programs:
        kernel.norm_reverse_kernel[(programs,)](
            x if grad is None else grad, x if grad_dot is None else grad_dot, x,
            x if x_dot is None else x_dot, weight.contiguous(), x if beside is None else beside, out, sums, N=nodes,
            each=each, VALUE=grad is not None, TANGENT=grad_dot is not None, WEIGHTS=by_weight,
            BESIDE=beside is not None, **constants,
        )  # fmt: skip
    return out, degree_sums(sums.sum(0)) if by_weight else None


def launch_norm_rows(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Rows:
    """The norm of x [N, M, C], contiguous, as float16 rows with a factor per node."""
    rows = new_rows(x, *x.shape)
    launch_norm(x, weight, bias, shift, rows)
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

    more: another term of grad, with its row_factors.
    """
    if x.numel():
        further, factors = (grad, row_factors) if more is None else more
        kernel.half_norm_reverse_kernel[(x.shape[0],)](
            *grad, row_factors, *further, factors, x if beside is None else beside, x, weight.contiguous(), out,
            MORE=more is not None, BESIDE=beside is not None, **_constants(x, weight),
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Norm(NodeCall):
    """Tensors: x, the shift if there is one, weight, bias. nodes: 2 with a shift."""

    nodes: int

    def reference(self, *tensors: Tensor) -> Tensor:
        x, *shift, weight, bias = tensors
        return equivariant_rms_norm_reference(x, weight, bias, *shift)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, *shift, weight, bias = tensors
        return launch_norm(x.contiguous(), weight, bias, *(shift or [None]))

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor | None]:
        weight = self.nodes
        found: dict[int, Tensor | None] = {}
        if weight == 2:
            found[1] = grad[:, 0]
        if weight + 1 in wanted:
            found[weight + 1] = grad[:, 0].sum(0)
        if 0 in wanted or weight in wanted:
            given = tensors[0].contiguous(), tensors[weight], grad.contiguous()
            found[0], found[weight] = launch_norm_reverse(*given, by_weight=weight in wanted)
        return [found[n] for n in wanted]

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        weight, given = self.nodes, change.along()
        if any(n >= weight for n in given):
            return None
        x, x_dot, shift = tensors[0].contiguous(), given.get(0), given.get(1)
        found: dict[int, Tensor | None] = {}
        if x_dot is None:  # the gradient by the shift is grad itself
            found[0] = torch.zeros_like(x)
            found[0][:, 0] = shift
        else:
            x_dot = x_dot.contiguous()
            if 0 in by:
                _, found[0] = launch_norm_tangent(x, x_dot, tensors[weight], None)
                if shift is not None:
                    found[0][:, 0] += shift
            if 1 in by or 1 + weight in by:
                found[1], found[1 + weight] = launch_norm_reverse(
                    x, tensors[weight], None, x_dot, change.grad.contiguous(), 1 + weight in by
                )
        return [found.get(n) for n in by]


def _call(x: Tensor, *rest: Tensor) -> _Norm:
    *shift, weight, bias = rest
    nodes, channels, degrees = x.shape[0], x.shape[-1], weight.shape[0]
    check_nodes(
        "equivariant_rms_norm", "x", x, degrees,
        weight=(weight, "lmax+1, C", (degrees, channels)), bias=(bias, "C", (channels,)),
        shift=(shift[0] if shift else None, "N, C", (nodes, channels)),
    )  # fmt: skip
    return _Norm(1 + len(shift))


_registered = register(
    "equivariant_rms_norm",
    lambda tensors, *_: _call(*tensors),
    lambda tensors, *_: tensors[0].new_empty(tensors[0].shape),
)


def equivariant_rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None, mode: Mode = EXACT
) -> Tensor:
    """The function of :func:`equivariant_rms_norm_reference` with Triton kernels; differentiable to any order.

    A shift of 16 bits (autocast) is taken to the dtype of x. Raises ValueError, TypeError or RuntimeError for
    arguments that do not fit or a device without Triton. Compiled: see :mod:`e2former_kernels.common.registered`.
    """
    if shift is not None and shift.dtype.itemsize == 2:
        shift = shift.to(x.dtype)
    tensors = [t for t in (x, shift, weight, bias) if t is not None]
    return _registered(tensors, mode) if mode.compiled else apply_call(_call(*tensors), tensors)
