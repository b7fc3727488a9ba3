"""Gated feed-forward network with Triton kernels: nothing is kept for the backward pass but its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.grouped_linear import apply_so3
from e2former_kernels.common.step import node_plan, node_runs, run_step
from e2former_kernels.common.tiles import next_power
from e2former_kernels.feedforward.kernel import gate_backward_kernel, gate_kernel
from e2former_kernels.feedforward.reference import SIGMOID_SCALE, SILU_SCALE, gated_feedforward_reference
from e2former_kernels.norm.op import launch_norm, launch_norm_backward


@dataclass(frozen=True)
class _FeedForward:
    plan: Plan

    @staticmethod
    def _first(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        weight1, bias1, gate_weight, gate_bias = weights[:4]
        y = apply_so3(x, weight1, False, torch.empty_like(x))
        y[:, 0] += bias1
        return y, torch.addmm(gate_bias, y[:, 0], gate_weight.t())

    @staticmethod
    def _grid(x: Tensor) -> tuple[tuple[int, int], dict]:
        channels = x.shape[-1]
        block = min(next_power(channels), 256)
        return (x.shape[0], triton.cdiv(channels, block)), {"C": channels, "BC": block, "num_warps": 2}

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, norm_weight, norm_bias, *weights = tensors
        weight2, bias2 = weights[4:]
        x = x.contiguous()
        out = torch.empty_like(x)
        if x.numel():
            for run in node_runs(x.shape[0]):
                y, gates = self._first(launch_norm(x[run.nodes], norm_weight, norm_bias, None), weights)
                grid, constants = self._grid(y)
                gate_kernel[grid](y, gates, SILU=SILU_SCALE, SIGMOID=SIGMOID_SCALE, D=weight2.shape[0], **constants)
                apply_so3(y, weight2, False, out[run.nodes])
            out[:, 0] += bias2
        return out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        if any(n > 0 for n in wanted):
            return list(self.plan.vjp(wanted, tensors).run([grad, *tensors]))
        x, norm_weight, norm_bias, *weights = tensors
        weight1, gate_weight, weight2 = weights[0], weights[2], weights[4]
        x, grad = x.contiguous(), grad.contiguous()
        out = torch.empty_like(x)
        if x.numel():
            for run in node_runs(x.shape[0]):
                y, gates = self._first(launch_norm(x[run.nodes], norm_weight, norm_bias, None), weights)
                part = torch.empty_like(y)
                apply_so3(grad[run.nodes], weight2, True, part)
                grid, constants = self._grid(y)
                gate_backward_kernel[grid](
                    part, y, gates, SILU=SILU_SCALE, SIGMOID=SIGMOID_SCALE, D=weight2.shape[0], **constants
                )
                torch.mm(gates, gate_weight, out=part[:, 0])
                apply_so3(part, weight1, True, y)
                launch_norm_backward(y, x[run.nodes], norm_weight, out[run.nodes])
        return [out]


@torch.compiler.disable()
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
    """The function of :func:`gated_feedforward_reference` with Triton kernels; differentiable to any order."""
    weights = [norm_weight, norm_bias, weight1, bias1, gate_weight, gate_bias, weight2, bias2]
    step = _FeedForward(node_plan(gated_feedforward_reference, [x], weights))
    return run_step(step, [x, *weights])
