"""Equivariant norm with Triton kernels: one pass over the features in each direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.step import node_plan, run_step
from e2former_kernels.common.tiles import next_power
from e2former_kernels.norm.kernel import norm_backward_kernel, norm_kernel
from e2former_kernels.norm.reference import NORM_EPS, equivariant_rms_norm_reference


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


def launch_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the norm by x. grad, x, out: [N, M, C], contiguous."""
    out = torch.empty_like(x) if out is None else out
    if x.numel():
        norm_backward_kernel[(x.shape[0],)](grad, x, weight.contiguous(), out, **_constants(x, weight))
    return out


@dataclass(frozen=True)
class _Norm:
    plan: Plan
    shifted: bool

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, *rest = tensors
        weight, bias = rest[-2:]
        return launch_norm(x.contiguous(), weight, bias, rest[0] if self.shifted else None)

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        nodes = 2 if self.shifted else 1
        if any(n >= nodes for n in wanted):
            return list(self.plan.vjp(wanted, tensors).run([grad, *tensors]))
        found = {1: grad[:, 0]}
        if 0 in wanted:
            found[0] = launch_norm_backward(grad.contiguous(), tensors[0].contiguous(), tensors[-2])
        return [found[n] for n in wanted]


def _function(*tensors: Tensor) -> Tensor:
    x, *shift, weight, bias = tensors
    return equivariant_rms_norm_reference(x, weight, bias, *shift)


@torch.compiler.disable()
def equivariant_rms_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
    """The function of :func:`equivariant_rms_norm_reference` with Triton kernels; differentiable to any order."""
    nodes = [x] if shift is None else [x, shift]
    weights = [weight, bias]
    step = _Norm(node_plan(_function, nodes, weights), shift is not None)
    return run_step(step, nodes + weights)
