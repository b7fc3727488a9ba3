"""Edges in runs of whole receivers: what kernels need to know of a run, and any function of edges evaluated run by run.

Messages are summed over edges. Sorted by receiver, the edges split into runs of whole receivers, and the
sum splits with them: its value, its vector-Jacobian product, the product's own vector-Jacobian product, and so on, are
all "for every run: gather, compute, scatter". :class:`Plan` uses this one observation for all of them, so no tensor
with an edge dimension outlives its run in forward, backward, double backward or beyond, while the per-edge computation
is written once, as ordinary differentiable PyTorch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MIN_RUN_EDGES = 64  # however wide the network
MAX_RUN_NODES = 8192  # nodes worked on at a time by operations on nodes


class NodeRun(NamedTuple):
    """Consecutive nodes."""

    nodes: slice


@functools.lru_cache(maxsize=64)
def node_runs(number: int, size: int = MAX_RUN_NODES) -> Sequence[NodeRun]:
    """All nodes in as few runs of at most ``size`` as there can be, of equal length."""
    runs = max(-(-number // size), 1)
    bounds = [number * n // runs for n in range(runs + 1)]
    return tuple(NodeRun(slice(*pair)) for pair in itertools.pairwise(bounds))


@dataclass(frozen=True, eq=False)
class EdgeRun:
    """A run of receivers and all their edges.

    nodes, edges: slices of the receivers and of the edge list, and their lengths. source: [e] sender of each edge.
    target: [e] receiver from the run's first. row_ptr: [n+1]. species: of all atoms. senders: [s] atoms that send to
    this run, ascending, or None where every atom counts (one run for the whole graph). order, order_ptr: [e], [s+1],
    the run's edges sorted by sender.
    """

    nodes: slice
    edges: slice
    num_nodes: int
    num_edges: int
    source: Tensor
    target: Tensor
    row_ptr: Tensor
    species: Tensor
    senders: Tensor | None
    order: Tensor
    order_ptr: Tensor

    @functools.cached_property
    def elements(self) -> tuple[Tensor, Tensor]:
        """Atomic numbers of receiver and sender of every edge, [e] each."""
        receivers = self.species[self.nodes].index_select(0, self.target)
        return receivers, self.species.index_select(0, self.source)


def _pointer(sorted_index: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(sorted_index, torch.arange(rows + 1, device=sorted_index.device))


def _boundaries(row_ptr: Tensor, max_edges: int) -> list[tuple[int, int, int, int]]:
    """(first node, last node + 1, first edge, last edge + 1) of runs of at most ``max_edges`` edges."""
    ptr = row_ptr.cpu()
    nodes, bounds, start = ptr.numel() - 1, [], 0
    while start < nodes:
        first = int(ptr[start])
        stop = int(torch.searchsorted(ptr, first + max_edges, right=True)) - 1
        stop = min(max(stop, start + 1), nodes)
        bounds.append((start, stop, first, int(ptr[stop])))
        start = stop
    return bounds


class SeveralRuns(RuntimeError):
    """More edges than one run takes, of an :class:`EdgeList` with ``one_run``."""


class EdgeList:
    """The edges of one graph, and what operations on them need beside: made when it is asked for, and kept here.

    Args:
        source, target: [E] int64, sender and receiver of every edge; ``target`` ascends.
        row_ptr: [N+1], the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
        species: [N'], atomic numbers of the senders; receivers come first.
        transpose: gives the stable permutation [E] that sorts the edges by sender and its pointer [senders + 1]; made
            here when None.
        one_run: all that is made depends on the number of edges alone, not on the edges. For CUDA graphs, whose replays
            see other edges in the same memory. A number above one: for up to so many times the edges that a run takes
            otherwise; :class:`SeveralRuns` for more.
        max_edges: of a run; None: what fits in a working memory that does not depend on the number of edges.
    """

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        row_ptr: Tensor,
        species: Tensor,
        transpose: Callable[[], tuple[Tensor, Tensor]] | None = None,
        *,
        one_run: int = 0,
        max_edges: int | None = None,
    ) -> None:
        index = (source, target, row_ptr, species)
        self.source, self.target, self.row_ptr, self.species = (t.contiguous() for t in index)
        self.transpose, self.one_run, self.max_edges = transpose, one_run, max_edges
        self._runs: dict[int, list[EdgeRun]] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor], max_edges: int | None) -> EdgeList:
        """The list of :meth:`tensors`."""
        return cls(*tensors[:4], lambda: (tensors[4], tensors[5]), max_edges=max_edges or None)

    def tensors(self) -> list[Tensor]:
        """All tensors that the edges are made of."""
        return [self.source, self.target, self.row_ptr, self.species, *self.by_sender()]

    def by_sender(self) -> tuple[Tensor, Tensor]:
        """The permutation that sorts the edges by sender, and its pointer."""
        if self.transpose is not None:
            return self.transpose()
        order = torch.argsort(self.source, stable=True)
        return order, _pointer(self.source.index_select(0, order), self.species.numel())

    def runs(self, numbers: int, budget: int, single: int | None = None) -> list[EdgeRun]:
        """Runs of whole receivers whose edges take at most ``budget`` numbers; a receiver with more gets its own.

        numbers: working memory of an edge. single: all edges are one run where they take at most so many (default: the
        budget). One run needs no list of its senders and can be captured in a CUDA graph.
        """
        edges = max(self.source.numel(), 1)
        if self.max_edges is not None:
            size = self.max_edges
        elif edges * numbers <= (budget if single is None else single):
            size = edges
        else:
            size = max(budget // numbers, MIN_RUN_EDGES)
        return self.runs_of(size)

    def runs_of(self, max_edges: int) -> list[EdgeRun]:
        """Runs of whole receivers with at most ``max_edges`` edges; a receiver with more gets a run of its own."""
        max_edges = min(max_edges, max(self.source.numel(), 1))  # one run is one run
        if self.one_run:
            if self.source.numel() > self.one_run * max_edges:
                raise SeveralRuns(f"{self.source.numel()} edges, {max_edges} in a run")
            max_edges = max(self.source.numel(), 1)
        if max_edges not in self._runs:
            with torch.no_grad():
                self._runs[max_edges] = self._build(max_edges)
        return self._runs[max_edges]

    def _build(self, max_edges: int) -> list[EdgeRun]:
        source, target, row_ptr = self.source, self.target, self.row_ptr
        nodes, edges, runs = row_ptr.numel() - 1, source.numel(), []
        if edges <= max_edges:
            whole = slice(0, nodes), slice(0, edges), nodes, edges
            return [EdgeRun(*whole, source, target, row_ptr, self.species, None, *self.by_sender())]
        for start, stop, first, last in _boundaries(row_ptr, max_edges):
            senders, local = torch.unique(source[first:last], return_inverse=True)
            order = torch.argsort(local, stable=True)
            places = slice(start, stop), slice(first, last), stop - start, last - first
            own = source[first:last], target[first:last] - start, row_ptr[start : stop + 1] - first
            pointer = _pointer(local.index_select(0, order), senders.numel())
            runs.append(EdgeRun(*places, *own, self.species, senders, order, pointer))
        return runs


# How an argument or a result relates to a run. A node tensor of kind SOURCE arrives gathered to the run's edges (and is
# scattered back by addition), TARGET is the slice of the run's receivers, EDGE the slice of its edges, WHOLE is seen in
# full (and results of that kind are summed over runs).
SOURCE, TARGET, EDGE, WHOLE = "source", "target", "edge", "whole"


def _take(x: Tensor, kind: str, run: EdgeRun | NodeRun) -> Tensor:
    if kind == SOURCE:
        return x.index_select(0, run.source)
    if kind == TARGET:
        return x[run.nodes]
    return x[run.edges] if kind == EDGE else x


@dataclass(frozen=True)
class Plan:
    """A function of one run, what its arguments and results are, and the runs."""

    function: Callable[..., Sequence[Tensor]]
    runs: Sequence[EdgeRun | NodeRun]
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    rows: tuple[int | None, ...]  # number of rows of each SOURCE result

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of all runs, put together."""
        parts: list[list[Tensor]] = [[] for _ in self.results]
        sums: list[Tensor | None] = [None] * len(self.results)
        # detached, or an argument's own history would join two arguments inside a run's derivative
        tensors = [t.detach() for t in tensors]
        with torch.no_grad():
            for run in self.runs:
                given = [_take(t, k, run) for t, k in zip(tensors, self.arguments, strict=True)]
                values = self.function(run, *given)
                for n, (value, kind) in enumerate(zip(values, self.results, strict=True)):
                    if kind in (TARGET, EDGE):
                        parts[n].append(value)
                    elif kind == WHOLE:
                        sums[n] = value if sums[n] is None else sums[n] + value
                    else:
                        if sums[n] is None:
                            sums[n] = value.new_zeros((self.rows[n], *value.shape[1:]))
                        sums[n].index_add_(0, run.source, value)
        return tuple((p[0] if len(p) == 1 else torch.cat(p)) if p else s for p, s in zip(parts, sums, strict=True))

    def vjp(self, wanted: Sequence[int], tensors: Sequence[Tensor]) -> Plan:
        """The plan of (gradients of the results, arguments) -> gradients of the wanted arguments."""
        function, num_results = self.function, len(self.results)

        def pullback(run: EdgeRun | NodeRun, *args: Tensor) -> list[Tensor]:
            create_graph = torch.is_grad_enabled()
            cotangents, primals = args[:num_results], list(args[num_results:])
            for n in wanted:
                if not primals[n].requires_grad:
                    primals[n] = primals[n].detach().requires_grad_()
            with torch.enable_grad():
                values = function(run, *primals)
                used = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
                inputs = [primals[n] for n in wanted]
                if not used:
                    return [torch.zeros_like(x) for x in inputs]
                outputs, given = zip(*((v, c.to(v.dtype)) for v, c in used), strict=True)
                options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
                return list(torch.autograd.grad(outputs, inputs, given, **options))

        kinds = tuple(self.arguments[n] for n in wanted)
        rows = tuple(tensors[n].shape[0] if k == SOURCE else None for n, k in zip(wanted, kinds, strict=True))
        return Plan(pullback, self.runs, self.results + self.arguments, kinds, rows)


def plan_of(
    function: Callable[..., Tensor], runs: Sequence[EdgeRun | NodeRun], arguments: Sequence[tuple[str, Tensor]]
) -> Plan:
    """The plan of ``function(run, *arguments) -> [receivers of the run, ...]``.

    function: differentiable; tensors that need gradients must come in as arguments, whatever else it uses it may close
    over. arguments: (kind, tensor) in call order.
    """
    kinds = tuple(k for k, _ in arguments)
    return Plan(lambda run, *args: (function(run, *args),), runs, kinds, (TARGET,), (None,))
