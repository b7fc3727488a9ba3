"""Equivariant norm with Triton kernels: one pass over the features in each direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.checks import check_node_operation
from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.registered import Settings, register
from e2former_kernels.common.step import Change, node_plan, run_step
from e2former_kernels.norm.passes import launch_norm, launch_norm_reverse, launch_norm_tangent
from e2former_kernels.norm.reference import equivariant_rms_norm_reference


@dataclass(frozen=True)
class _Norm:
    """Tensors: x, the shift if there is one, weight, bias."""

    plan: Plan
    shifted: bool

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, *rest = tensors
        weight, bias = rest[-2:]
        return launch_norm(x.contiguous(), weight, bias, rest[0] if self.shifted else None)

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        return self._gradients(grad, tensors, wanted)

    def _gradients(
        self, grad: Tensor, tensors: list[Tensor], wanted: list[int], *change: Tensor
    ) -> list[Tensor | None]:
        """Of <grad, value>, and of <change[1], change of the value along change[0]> if it is given."""
        weight = len(tensors) - 2
        found: dict[int, Tensor | None] = {}
        if self.shifted:
            found[1] = grad[:, 0]
        if weight + 1 in wanted:
            found[weight + 1] = grad[:, 0].sum(0)
        if 0 in wanted or weight in wanted:
            found[0], found[weight] = launch_norm_reverse(
                tensors[0].contiguous(),
                tensors[weight],
                grad.contiguous(),
                *(t.contiguous() for t in change),
                by_weight=weight in wanted,
            )
        return [found[n] for n in wanted]

    def second(
        self, cotangents: list[Tensor | None], grad: Tensor, tensors: list[Tensor], wanted: list[int], again: list[int]
    ) -> list[Tensor] | None:
        weight = len(tensors) - 2
        if any(n >= weight for n in wanted):
            return None
        given = dict(zip(wanted, cotangents, strict=True))
        x, x_dot, shift = tensors[0].contiguous(), given.get(0), given.get(1)
        found: dict[int, Tensor | None] = {}
        if x_dot is None:  # the gradient by the shift is grad itself
            found[0] = torch.zeros_like(x)
            found[0][:, 0] = shift
        else:
            x_dot = x_dot.contiguous()
            if 0 in again:
                _, found[0] = launch_norm_tangent(x, x_dot, tensors[weight], None, shift)
            if 1 in again or 1 + weight in again:
                found[1], found[1 + weight] = launch_norm_reverse(
                    x, tensors[weight], None, x_dot, grad.contiguous(), 1 + weight in again
                )
        return [found.get(n) for n in again]

    def leaves(self, change: Change) -> bool:
        return change.cotangents[0] is not None and change.wanted in ([0], [0, 1][: 1 + self.shifted])

    def both(self, grad: Tensor, tensors: list[Tensor], wanted: list[int], change: Change) -> list[Tensor]:
        return self._gradients(grad.contiguous(), tensors, wanted, change.cotangents[0], change.grad)


def _function(*tensors: Tensor) -> Tensor:
    x, *shift, weight, bias = tensors
    return equivariant_rms_norm_reference(x, weight, bias, *shift)


def _step(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> _Norm:
    nodes, channels, degrees = x.shape[0], x.shape[-1], weight.shape[0]
    check_node_operation(
        "equivariant_rms_norm", "x", x, degrees,
        weight=(weight, "lmax+1, C", (degrees, channels)), bias=(bias, "C", (channels,)),
        shift=(shift, "N, C", (nodes, channels)),
    )  # fmt: skip
    return _Norm(node_plan(_function, [x] if shift is None else [x, shift], [weight, bias]), shift is not None)


def _make_step(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> _Norm:
    x, *shift, weight, bias = tensors
    return _step(x, weight, bias, shift[0] if shift else None)


_registered = register("equivariant_rms_norm", _make_step, lambda tensors, *_: tensors[0].new_empty(tensors[0].shape))


@torch.compiler.disable()
def _run(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> Tensor:
    return run_step(_step(x, weight, bias, shift), [t for t in (x, shift, weight, bias) if t is not None])


def equivariant_rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None, mode: Mode = EXACT
) -> Tensor:
    """The function of :func:`equivariant_rms_norm_reference` with Triton kernels; differentiable to any order.

    A shift in half precision (autocast) is taken to the dtype of x. Raises ValueError, TypeError or RuntimeError for
    arguments that do not fit or a device without Triton. Compiled: see :mod:`e2former_kernels.common.registered`.
    """
    if shift is not None and shift.dtype in (torch.float16, torch.bfloat16):
        shift = shift.to(x.dtype)
    if mode.compiled:
        return _registered([t for t in (x, shift, weight, bias) if t is not None], mode)
    return _run(x, weight, bias, shift)
