"""Queries and keys with Triton kernels: the products of size rows x 4 G exist for a bounded run of nodes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.grouped_linear import apply_so3
from e2former_kernels.common.radial_kernel import norm_launch, second_backward_kernel, second_kernel
from e2former_kernels.common.step import NodeRun, node_plan, node_runs, run_step
from e2former_kernels.common.tiles import next_power
from e2former_kernels.query_key.kernel import invariants_backward_kernel, invariants_kernel
from e2former_kernels.query_key.reference import QueryKeyWeights, query_key_reference

RUN_NUMBERS = 1 << 26  # working memory of a run of nodes, in numbers: 256 MB in float32


class _Run(NamedTuple):
    """What the forward pass makes for a run: P [M, n, 4 G], the hidden layer's products and its result [2, n, G]."""

    both: Tensor
    middle: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class _QueryKey:
    plan: Plan

    @staticmethod
    def _runs(h: Tensor, weights: QueryKeyWeights) -> list[NodeRun]:
        return node_runs(h.shape[0], max(RUN_NUMBERS // (h.shape[1] * weights.weight.shape[1]), 16)) if len(h) else []

    @staticmethod
    def _invariants(kernel, both: Tensor, bias: Tensor, s: Tensor, degrees: int) -> None:
        nodes, width = both.shape[1], bias.shape[0]
        block = min(next_power(width), 1024)
        kernel[nodes, triton.cdiv(width, block)](both, bias, s, nodes, width, D=degrees, BG=block)

    def _run(self, h: Tensor, weights: QueryKeyWeights) -> _Run:
        nodes, rows, _ = h.shape
        both = h.new_empty(rows, nodes, weights.weight.shape[1])
        apply_so3(h, weights.weight, False, both.transpose(0, 1))
        s = h.new_empty(2, nodes, weights.hidden_weight.shape[2])
        self._invariants(invariants_kernel, both, weights.bias, s, weights.weight.shape[0])
        middle = torch.bmm(s, weights.hidden_weight.transpose(1, 2))
        hidden = torch.empty_like(middle)
        grid, constants = norm_launch(*middle.shape, norms=True)
        second_kernel[grid](
            middle, weights.hidden_bias, weights.norm_weight, weights.norm_bias, hidden, EDGE_MAJOR=False, **constants
        )
        return _Run(both, middle, hidden)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        h, *rest = (t.contiguous() for t in tensors)
        weights = QueryKeyWeights(*rest)
        out = h.new_empty(h.shape[0], 2, weights.out_weight.shape[1])
        for run in self._runs(h, weights):
            hidden = self._run(h[run.nodes], weights).hidden
            to = out[run.nodes].transpose(0, 1)
            torch.baddbmm(weights.out_bias.unsqueeze(1), hidden, weights.out_weight.transpose(1, 2), out=to)
        return out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        if any(n > 0 for n in wanted):
            return list(self.plan.vjp(wanted, tensors).run([grad, *tensors]))
        h, *rest = (t.detach().contiguous() for t in tensors)
        weights = QueryKeyWeights(*rest)
        grad = grad.contiguous()
        out = torch.empty_like(h)
        for run in self._runs(h, weights):
            both, middle, _ = self._run(h[run.nodes], weights)
            grad_hidden = torch.bmm(grad[run.nodes].transpose(0, 1), weights.out_weight)
            grid, constants = norm_launch(*middle.shape, norms=True)
            second_backward_kernel[grid](
                grad_hidden, middle, weights.hidden_bias, weights.norm_weight, weights.norm_bias, middle,
                EDGE_MAJOR=False, **constants,
            )  # fmt: skip
            grad_s = torch.bmm(middle, weights.hidden_weight)
            self._invariants(invariants_backward_kernel, both, weights.bias, grad_s, weights.weight.shape[0])
            apply_so3(both.transpose(0, 1), weights.weight, True, out[run.nodes])
        return [out]


@torch.compiler.disable()
def query_key(h: Tensor, weights: QueryKeyWeights) -> Tensor:
    """The function of :func:`query_key_reference` with Triton kernels; differentiable to any order."""
    step = _QueryKey(node_plan(lambda h, *w: query_key_reference(h, QueryKeyWeights(*w)), [h], list(weights)))
    return run_step(step, [h, *weights])
