"""An operation with fused kernels for its value and first derivative, and recomputation for all further ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from e2former_kernels.common.chunked import TARGET, WHOLE, Chunked, Plan, not_leaves, plan_of, wanted_inputs

MAX_RUN_NODES = 8192  # nodes worked on at a time by operations on nodes


class NodeRun(NamedTuple):
    """Consecutive nodes."""

    nodes: slice


def node_runs(number: int, size: int = MAX_RUN_NODES) -> list[NodeRun]:
    """All nodes in as few runs of at most ``size`` as there can be, of equal length."""
    runs = max(-(-number // size), 1)
    bounds = [number * n // runs for n in range(runs + 1)]
    return [NodeRun(slice(*pair)) for pair in itertools.pairwise(bounds)]


def node_plan(function: Callable[..., Tensor], nodes: Sequence[Tensor], weights: Sequence[Tensor]) -> Plan:
    """Plan of ``function(*node_tensors, *weights)``, which maps rows of nodes to rows of the same nodes."""
    arguments = [(TARGET, t) for t in nodes] + [(WHOLE, t) for t in weights]
    return plan_of(lambda run, *tensors: function(*tensors), node_runs(nodes[0].shape[0]), arguments)


class Step(Protocol):
    """What :func:`run_step` runs. plan: the same function for :class:`e2former_kernels.common.chunked.Chunked`.

    A step may also have ``second(cotangents, grad, tensors, wanted, again)``: its second derivative with fused kernels,
    without a graph. With L = sum over ``wanted`` of <cotangent, gradient of that tensor>, it returns dL by the inputs
    numbered in ``again``, where 0 is ``grad`` and 1 + n is tensor n; None for a cotangent stands for zeros. It returns
    None where its kernels do not cover ``wanted``: then, for steps without it, and for derivatives beyond the second,
    the derivative is recomputed through ``plan``.
    """

    plan: Plan

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """Value, without a graph."""

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        """Gradients of the tensors numbered in ``wanted``, without a graph."""


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: Step, *tensors: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return step.forward(list(tensors))

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        wanted = wanted_inputs(ctx, 1)
        out: list[Tensor | None] = [None] * (1 + len(tensors))
        if wanted:
            for n, g in zip(wanted, _Gradient.apply(ctx.step, wanted, grad, *tensors), strict=True):
                out[1 + n] = g
        return tuple(out)


class _Gradient(torch.autograd.Function):
    """The first derivative; its own derivatives are recomputed run by run."""

    @staticmethod
    def forward(ctx, step: Step, wanted: list[int], grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.wanted = step, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *tensors)
        with torch.autocast(grad.device.type, enabled=False):
            return tuple(step.backward(grad, list(tensors), wanted))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None):
        saved = ctx.saved_tensors
        again = wanted_inputs(ctx, 2)
        out: list[Tensor | None] = [None] * (2 + len(saved))
        if not again or all(c is None for c in cotangents):
            return tuple(out)
        second, found = getattr(ctx.step, "second", None), None
        if second is not None and not torch.is_grad_enabled():
            with torch.autocast(saved[0].device.type, enabled=False):
                found = second(list(cotangents), saved[0], list(saved[1:]), ctx.wanted, again)
        if found is None:
            plan = ctx.step.plan.vjp(ctx.wanted, saved[1:]).vjp(again, saved)
            given = [
                torch.zeros_like(saved[1 + n]) if c is None else c for n, c in zip(ctx.wanted, cotangents, strict=True)
            ]
            found = Chunked.apply(plan, *given, *saved)
        for n, g in zip(again, found, strict=True):
            out[2 + n] = g
        return tuple(out)


def run_step(step: Step, tensors: list[Tensor]) -> Tensor:
    """Value of ``step`` at ``tensors``, differentiable to any order in each of them."""
    return _Value.apply(step, *not_leaves(tensors))
