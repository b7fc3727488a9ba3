"""Queries and keys with Triton kernels: the products of size rows x 4 G exist for a bounded run of nodes only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from e2former_kernels.common.again import computed_again
from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.chunked import Plan
from e2former_kernels.common.registered import Settings, register
from e2former_kernels.common.step import node_plan, run_step
from e2former_kernels.query_key.half import HalfWeights, query_key_gradient, query_key_value
from e2former_kernels.query_key.passes import RowWeights, forward_run, gradients, outputs, row_weights, runs
from e2former_kernels.query_key.reference import QueryKeyWeights, check_query_key, query_key_reference


def _apart(grad: Tensor) -> Tensor:
    """[N, 2, O] as [2, N, O], how it lies in memory where queries and keys went apart."""
    return grad.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class _QueryKey:
    plan: Plan
    trained: bool
    prepared: HalfWeights | RowWeights | None = None  # of frozen weights, kept by the caller
    cache: dict = field(default_factory=dict, compare=False)  # what the passes of a training step share

    def _rows(self, weights: QueryKeyWeights) -> RowWeights:
        if isinstance(self.prepared, RowWeights):
            return self.prepared
        if "rows" in self.cache:
            return self.cache["rows"]
        rows = row_weights(weights)
        if self.trained:
            self.cache["rows"] = rows
        return rows

    def forward(self, tensors: list[Tensor]) -> Tensor:
        h, *rest = (t.contiguous() for t in tensors)
        weights = QueryKeyWeights(*rest)
        if isinstance(self.prepared, HalfWeights):
            return query_key_value(h, self.prepared).transpose(0, 1)
        out = h.new_empty(2, h.shape[0], weights.out_weight.shape[1])
        rows = self._rows(weights)
        for run in runs(h, rows, 1, self.trained):
            outputs(forward_run(h[run.nodes], None, rows).hidden[:, 0], rows, out[:, run.nodes])
        return out.transpose(0, 1)  # in memory queries and keys lie apart, as the attention reads them

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        h, *rest = (t.contiguous() for t in tensors)
        weights = QueryKeyWeights(*rest)
        if isinstance(self.prepared, HalfWeights):
            return [query_key_gradient(_apart(grad).transpose(0, 1), h, self.prepared)]
        by_h, by_weights, _ = gradients(_apart(grad), h, None, self._rows(weights), any(wanted), self.trained)
        found = [by_h, *(by_weights or ())]
        return [found[n] for n in wanted]

    def second(
        self, cotangents: list[Tensor | None], grad: Tensor, tensors: list[Tensor], wanted: list[int], again: list[int]
    ) -> list[Tensor] | None:
        if wanted != [0]:
            return None
        h, *rest = (t.contiguous() for t in tensors)
        rows, by_weights = self._rows(QueryKeyWeights(*rest)), any(n > 1 for n in again)
        given = _apart(grad), h, cotangents[0].contiguous()
        by_h, by_weights, tangent = gradients(*given, rows, by_weights, self.trained)
        found = [tangent.transpose(0, 1), by_h, *(by_weights or ())]
        return [found[n] for n in again]


def _step(
    h: Tensor, weights: QueryKeyWeights, mode: Mode, prepared: HalfWeights | RowWeights | None = None
) -> _QueryKey:
    check_query_key(h, weights)
    if prepared is not None and mode.trained:
        raise ValueError("query_key: prepared: expected None where weights are trained")
    plan = node_plan(lambda h, *w: query_key_reference(h, QueryKeyWeights(*w)), [h], list(weights))
    return _QueryKey(plan, mode.trained, prepared)


def _shape(tensors: list[Tensor], *_) -> Tensor:
    h, out_weight = tensors[0], QueryKeyWeights(*tensors[1:]).out_weight
    return h.new_empty(2, h.shape[0], out_weight.shape[1]).transpose(0, 1)


def _make_step(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> _QueryKey:
    return _step(tensors[0], QueryKeyWeights(*tensors[1:]), mode)


_registered = register("query_key", _make_step, _shape)


@torch.compiler.disable()
def _run(h: Tensor, weights: QueryKeyWeights, h_again: Callable[[], Tensor] | None, mode: Mode, prepared) -> Tensor:
    with computed_again((h, h_again)):
        return run_step(_step(h, weights, mode, prepared), [h, *weights])


def query_key(
    h: Tensor,
    weights: QueryKeyWeights,
    h_again: Callable[[], Tensor] | None = None,
    prepared: HalfWeights | RowWeights | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    """The function of :func:`query_key_reference` with Triton kernels; differentiable to any order.

    h_again: gives h once more, so that it is not kept (:mod:`e2former_kernels.common.again`). prepared: of weights that
    do not change and need no gradient, :func:`.half.half_weights` for value and gradient by h with float16 rows
    (``half.py``), or :func:`.passes.row_weights`; float32 and made here when None. Both have no effect where ``mode``
    is compiled, for which see :mod:`e2former_kernels.common.registered`.
    """
    if mode.compiled:
        return _registered([h, *weights], mode)
    return _run(h, weights, h_again, mode, prepared)
