"""Queries and keys with Triton kernels: the products of size rows x 4 G exist for a bounded run of nodes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.step import node_plan, node_runs, run_step
from e2former_kernels.common.tiles import next_power
from e2former_kernels.query_key.kernel import invariants_backward_kernel, invariants_kernel
from e2former_kernels.query_key.reference import QueryKeyWeights, heads_of, query_key_reference

RUN_NODES = 4096


@dataclass(frozen=True)
class _QueryKey:
    plan: Plan

    @staticmethod
    def _products(h: Tensor, weight: Tensor) -> Tensor:
        """[M, n, 4 G]: W of each row's degree times the row."""
        nodes, rows, _ = h.shape
        both = h.new_empty(rows, nodes, weight.shape[1])
        for degree in range(weight.shape[0]):
            part = slice(degree * degree, (degree + 1) ** 2)
            a = h[:, part].transpose(0, 1)
            torch.bmm(a, weight[degree].t().expand(a.shape[0], -1, -1), out=both[part])
        return both

    @staticmethod
    def _launch(kernel, both: Tensor, bias: Tensor, s: Tensor, degrees: int) -> None:
        nodes, width = both.shape[1], bias.shape[0]
        block = min(next_power(width), 1024)
        kernel[nodes, triton.cdiv(width, block)](both, bias, s, nodes, width, D=degrees, BG=block)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        h, *rest = (t.contiguous() for t in tensors)
        weights = QueryKeyWeights(*rest)
        out = h.new_empty(h.shape[0], 2, weights.out_weight.shape[1])
        for run in node_runs(h.shape[0], RUN_NODES):
            part = h[run.nodes]
            if part.numel():
                both = self._products(part, weights.weight)
                s = h.new_empty(2, part.shape[0], weights.hidden_weight.shape[2])
                self._launch(invariants_kernel, both, weights.bias, s, weights.weight.shape[0])
                out[run.nodes] = heads_of(s, weights).transpose(0, 1)
        return out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        if any(n > 0 for n in wanted):
            return list(self.plan.vjp(wanted, tensors).run([grad, *tensors]))
        h, *rest = (t.detach().contiguous() for t in tensors)
        weights = QueryKeyWeights(*rest)
        degrees = weights.weight.shape[0]
        out = torch.empty_like(h)
        for run in node_runs(h.shape[0], RUN_NODES):
            part = h[run.nodes]
            if not part.numel():
                continue
            both = self._products(part, weights.weight)
            s = h.new_empty(2, part.shape[0], weights.hidden_weight.shape[2])
            self._launch(invariants_kernel, both, weights.bias, s, degrees)
            with torch.enable_grad():
                heads = heads_of(s.requires_grad_(), weights)
            (grad_s,) = torch.autograd.grad(heads, s, grad[run.nodes].transpose(0, 1))
            self._launch(invariants_backward_kernel, both, weights.bias, grad_s.contiguous(), degrees)
            for degree in range(degrees):
                rows = slice(degree * degree, (degree + 1) ** 2)
                to = out[run.nodes][:, rows].transpose(0, 1)
                torch.bmm(both[rows], weights.weight[degree].expand(2 * degree + 1, -1, -1), out=to)
        return [out]


@torch.compiler.disable()
def query_key(h: Tensor, weights: QueryKeyWeights) -> Tensor:
    """The function of :func:`query_key_reference` with Triton kernels; differentiable to any order."""
    step = _QueryKey(node_plan(lambda h, *w: query_key_reference(h, QueryKeyWeights(*w)), [h], list(weights)))
    return run_step(step, [h, *weights])
