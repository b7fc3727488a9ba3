"""Gated feed-forward network with Triton kernels: nothing is kept for the backward pass but its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e2former_kernels.common.checks import check_node_operation
from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.registered import register
from e2former_kernels.common.step import node_plan, run_step
from e2former_kernels.feedforward.passes import Weights, gradients, value
from e2former_kernels.feedforward.reference import gated_feedforward_reference


@dataclass(frozen=True)
class _FeedForward:
    plan: Plan

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return value(tensors[0].contiguous(), Weights(*tensors[1:]))

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        weights = Weights(*tensors[1:])
        by_x, by_weights, _ = gradients(grad.contiguous(), tensors[0].contiguous(), None, weights, any(wanted))
        found = [by_x, *(by_weights or ())]
        return [found[n] for n in wanted]

    def second(
        self, cotangents: list[Tensor | None], grad: Tensor, tensors: list[Tensor], wanted: list[int], again: list[int]
    ) -> list[Tensor] | None:
        if wanted != [0]:
            return None
        x, x_dot = tensors[0].contiguous(), cotangents[0].contiguous()
        by_weights = any(n > 1 for n in again)
        by_x, by_weights, change = gradients(grad.contiguous(), x, x_dot, Weights(*tensors[1:]), by_weights)
        found = [change, by_x, *(by_weights or ())]
        return [found[n] for n in again]


def _step(x: Tensor, *weights: Tensor) -> _FeedForward:
    norm_weight, norm_bias, weight1, bias1, gate_weight, gate_bias, weight2, bias2 = weights
    degrees, channels = norm_weight.shape[0], x.shape[-1]
    gates, square = degrees * channels, ("lmax+1, C, C", (degrees, channels, channels))
    check_node_operation(
        "gated_feedforward", "x", x, degrees,
        norm_weight=(norm_weight, "lmax+1, C", (degrees, channels)), norm_bias=(norm_bias, "C", (channels,)),
        weight1=(weight1, *square), bias1=(bias1, "C", (channels,)),
        gate_weight=(gate_weight, "(lmax+1) C, C", (gates, channels)), gate_bias=(gate_bias, "(lmax+1) C", (gates,)),
        weight2=(weight2, *square), bias2=(bias2, "C", (channels,)),
    )  # fmt: skip
    return _FeedForward(node_plan(gated_feedforward_reference, [x], list(weights)))


_registered = register(
    "gated_feedforward", lambda tensors, *_: _step(*tensors), lambda tensors, *_: tensors[0].new_empty(tensors[0].shape)
)


@torch.compiler.disable()
def _run(*tensors: Tensor) -> Tensor:
    return run_step(_step(*tensors), list(tensors))


def gated_feedforward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """The function of :func:`gated_feedforward_reference` with Triton kernels; differentiable to any order.

    Raises ValueError, TypeError or RuntimeError for arguments that do not fit or a device without Triton. Under
    torch.compile: see :mod:`e2former_kernels.common.registered`.
    """
    tensors = (x, norm_weight, norm_bias, weight1, bias1, gate_weight, gate_bias, weight2, bias2)
    return _registered(tensors) if torch.compiler.is_compiling() else _run(*tensors)
