"""Gated feed-forward network with Triton kernels: nothing is kept for the backward pass but its input."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.checks import check_node_operation
from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.registered import Settings, register
from e2former_kernels.common.step import node_plan, run_step
from e2former_kernels.feedforward.half import HalfWeights, half_gradient, half_value
from e2former_kernels.feedforward.passes import Weights, gradients, of_rows, value
from e2former_kernels.feedforward.reference import gated_feedforward_reference


@dataclass(frozen=True)
class _FeedForward:
    plan: Plan
    residual: bool
    trained: bool
    prepared: HalfWeights | Weights | None  # of frozen weights, kept by the caller
    cache: dict = field(default_factory=dict, compare=False)  # what the passes of a training step share

    def _of_rows(self, weights: Weights) -> Weights:
        if isinstance(self.prepared, Weights):
            return self.prepared
        if "weights" in self.cache:
            return self.cache["weights"]
        rows = of_rows(weights)
        if self.trained:
            self.cache["weights"] = rows
        return rows

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, weights = tensors[0].contiguous(), Weights(*tensors[1:])
        if isinstance(self.prepared, HalfWeights):
            return half_value(x, self.prepared, self.residual)
        out = value(x, self._of_rows(weights))
        return out.add_(x) if self.residual else out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        grad, x, weights = grad.contiguous(), tensors[0].contiguous(), Weights(*tensors[1:])
        if isinstance(self.prepared, HalfWeights):
            return [half_gradient(grad, x, self.prepared, self.residual)]
        by_x, by_weights, _ = gradients(grad, x, None, self._of_rows(weights), any(wanted), self.residual)
        found = [by_x, *(by_weights or ())]
        return [torch.zeros_like(tensors[n]) if found[n] is None else found[n] for n in wanted]

    def second(
        self, cotangents: list[Tensor | None], grad: Tensor, tensors: list[Tensor], wanted: list[int], again: list[int]
    ) -> list[Tensor] | None:
        if wanted != [0]:
            return None
        x, x_dot = tensors[0].contiguous(), cotangents[0].contiguous()
        by_weights = any(n > 1 for n in again)
        weights = self._of_rows(Weights(*tensors[1:]))
        by_x, by_weights, change = gradients(grad.contiguous(), x, x_dot, weights, by_weights, self.residual)
        found = [change, by_x, *(by_weights or ())]
        return [found[n] for n in again]


def _step(
    residual: bool, mode: Mode, prepared: HalfWeights | Weights | None, x: Tensor, *weights: Tensor
) -> _FeedForward:
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
    function = functools.partial(gated_feedforward_reference, residual=residual)
    if prepared is not None and mode.trained:
        raise ValueError("gated_feedforward: prepared: expected None where weights are trained")
    return _FeedForward(node_plan(function, [x], list(weights)), residual, mode.trained, prepared)


def _make_step(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> _FeedForward:
    return _step(bool(settings.integers[0]), mode, None, *tensors)


_registered = register("gated_feedforward", _make_step, lambda tensors, *_: tensors[0].new_empty(tensors[0].shape))


@torch.compiler.disable()
def _run(residual: bool, mode: Mode, prepared: HalfWeights | Weights | None, *tensors: Tensor) -> Tensor:
    return run_step(_step(residual, mode, prepared, *tensors), list(tensors))


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
    residual: bool = False,
    prepared: HalfWeights | Weights | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    """The function of :func:`gated_feedforward_reference` with Triton kernels; differentiable to any order.

    residual: plus x, without another pass over either with float16 rows. prepared: of weights that do not change and
    need no gradient, :func:`.half.half_weights` for value and gradient by x with float16 rows (``half.py``), or
    :func:`.passes.of_rows`; float32 and made here when None; without effect where ``mode`` is compiled, for which see
    :mod:`e2former_kernels.common.registered`. Raises ValueError, TypeError or RuntimeError for arguments that do not
    fit or a device without Triton.
    """
    tensors = (x, norm_weight, norm_bias, weight1, bias1, gate_weight, gate_bias, weight2, bias2)
    if mode.compiled:
        return _registered(list(tensors), mode, settings=Settings([int(residual)]))
    return _run(residual, mode, prepared, *tensors)
