"""Invariants with Triton kernels: the products of size rows x 2 G exist for a bounded run of nodes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.step import node_plan, node_runs, run_step
from e2former_kernels.common.tiles import next_power
from e2former_kernels.query_key.kernel import invariants_backward_kernel, invariants_kernel
from e2former_kernels.query_key.reference import invariants_reference

RUN_NODES = 2048


@dataclass(frozen=True)
class _Invariants:
    plan: Plan

    @staticmethod
    def _products(h: Tensor, weight: Tensor) -> Tensor:
        """[M, n, 2 G]: W of each row's degree times the row."""
        nodes, rows, _ = h.shape
        both = h.new_empty(rows, nodes, weight.shape[1])
        for degree in range(weight.shape[0]):
            part = slice(degree * degree, (degree + 1) ** 2)
            a = h[:, part].transpose(0, 1)
            torch.bmm(a, weight[degree].t().expand(a.shape[0], -1, -1), out=both[part])
        return both

    def forward(self, tensors: list[Tensor]) -> Tensor:
        h, weight, bias = (t.contiguous() for t in tensors)
        degrees, width = weight.shape[0], bias.shape[0]
        out = h.new_empty(h.shape[0], degrees, width)
        block = min(next_power(width), 1024)
        if out.numel():
            for run in node_runs(h.shape[0], RUN_NODES):
                part = h[run.nodes]
                grid = (part.shape[0], triton.cdiv(width, block))
                invariants_kernel[grid](
                    self._products(part, weight), bias, out[run.nodes], part.shape[0], width, D=degrees, BG=block
                )
        return out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        if any(n > 0 for n in wanted):
            return list(self.plan.vjp(wanted, tensors).run([grad, *tensors]))
        h, weight, bias = (t.contiguous() for t in tensors)
        grad = grad.contiguous()
        degrees, width = weight.shape[0], bias.shape[0]
        out = torch.empty_like(h)
        block = min(next_power(width), 1024)
        if out.numel():
            for run in node_runs(h.shape[0], RUN_NODES):
                part = h[run.nodes]
                both = self._products(part, weight)
                invariants_backward_kernel[part.shape[0], triton.cdiv(width, block)](
                    both, bias, grad[run.nodes], part.shape[0], width, D=degrees, BG=block
                )
                for degree in range(degrees):
                    rows = slice(degree * degree, (degree + 1) ** 2)
                    a = both[rows]
                    to = out[run.nodes][:, rows].transpose(0, 1)
                    torch.bmm(a, weight[degree].expand(a.shape[0], -1, -1), out=to)
        return [out]


@torch.compiler.disable()
def invariants(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The function of :func:`invariants_reference` with Triton kernels; differentiable to any order."""
    step = _Invariants(node_plan(invariants_reference, [h], [weight, bias]))
    return run_step(step, [h, weight, bias])
