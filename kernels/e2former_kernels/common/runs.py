"""Edges in runs of whole receivers: what kernels need to know of a run, and any function of edges evaluated run by run.

A message-passing step is a sum over edges. Sorted by receiver, the edges split into runs of whole receivers, and the
step splits with them: its value, its vector-Jacobian product, the product's own vector-Jacobian product, and so on, are
all "for every run: gather, compute, scatter". :func:`chunked` uses this one observation for all of them, so no tensor
with an edge dimension outlives its run in forward, backward, double backward or beyond, while the per-edge computation
is written once, as ordinary differentiable PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.compat import will_engine_execute_node

MIN_RUN_EDGES = 64  # however wide the network


class EdgeRun(NamedTuple):
    """A run of receivers, all their edges, and the senders of those edges counted from zero.

    nodes, edges: slices of the receivers and of the edge list. senders: [s] atoms that send to this run, ascending,
    or None where every atom counts (one run for the whole graph). source: [e] row of ``senders``. target: [e] receiver
    from the run's first. row_ptr: [n+1]. order, order_ptr: [e], [s+1], the run's edges sorted by sender. image_chunk:
    the same run with periodic images as senders, where an operation needs them.
    """

    nodes: slice
    edges: slice
    senders: Tensor | None
    source: Tensor
    target: Tensor
    row_ptr: Tensor
    order: Tensor
    order_ptr: Tensor
    image_chunk: EdgeRun | None = None

    @property
    def num_nodes(self) -> int:
        """Number of receivers."""
        return self.nodes.stop - self.nodes.start

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """source, target, row_ptr, order, order_ptr: the index arguments of the kernels."""
        return self.source, self.target, self.row_ptr, self.order, self.order_ptr

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return self.edges.stop - self.edges.start


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


def run_size(edges: int, numbers: int, budget: int, single: int | None = None) -> int:
    """Edges of a run: all of them where they take at most ``single`` numbers (default: the budget), else by the budget.

    numbers: working memory of an edge. One run needs no list of its senders and can be captured in a CUDA graph.
    """
    if edges * numbers <= (budget if single is None else single):
        return max(edges, 1)
    return max(budget // numbers, MIN_RUN_EDGES)


class LazyRuns(Sequence[EdgeRun]):
    """Runs that are made when somebody asks for them: most evaluations never do."""

    def __init__(self, make: Callable[[], list[EdgeRun]]) -> None:
        self._make, self._made = make, None

    def _chunks(self) -> list[EdgeRun]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __len__(self) -> int:
        return len(self._chunks())

    def __getitem__(self, n):
        return self._chunks()[n]


class SeveralRuns(RuntimeError):
    """More edges than one run takes, of an :class:`EdgeList` with ``one_run``."""


class EdgeList:
    """The edges of one graph, and what operations on them need beside: made when it is asked for, and kept here.

    Args:
        source, target: [E] int64, sender and receiver of every edge; ``target`` ascends.
        row_ptr: [N+1], the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
        species: [N'], atomic numbers of the senders; receivers come first.
        source_order: [E], the stable permutation that sorts the edges by sender; made when None.
        source_ptr: [senders + 1], its pointer; made when None.
        one_run: all that is made depends on the number of edges alone, not on the edges. For CUDA graphs, whose replays
            see other edges in the same memory. A number above one: for up to so many times the edges that a run takes
            otherwise; :class:`SeveralRuns` for more.
        senders: number of rows that ``source`` counts; None: those of ``species``.
    """

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        row_ptr: Tensor,
        species: Tensor,
        source_order: Tensor | None = None,
        source_ptr: Tensor | None = None,
        *,
        one_run: int = 0,
        senders: int | None = None,
    ) -> None:
        self.source, self.target, self.row_ptr, self.species = (
            t.contiguous() for t in (source, target, row_ptr, species)
        )
        self.source_order, self.source_ptr, self.one_run = source_order, source_ptr, one_run
        self.senders = species.numel() if senders is None else senders
        self._runs: dict[int, list[EdgeRun]] = {}
        self._elements: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def runs(self, max_edges: int) -> list[EdgeRun]:
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

    def elements(self, chunk: EdgeRun) -> tuple[Tensor, Tensor]:
        """Atomic numbers of receiver and sender of every edge of a run, [e] each."""
        key = chunk.nodes.start, chunk.nodes.stop
        if key not in self._elements:
            receivers = self.species[chunk.nodes].index_select(0, chunk.target)
            self._elements[key] = receivers, self.species.index_select(0, self.source[chunk.edges])
        return self._elements[key]

    def _build(self, max_edges: int) -> list[EdgeRun]:
        source, target, row_ptr = self.source, self.target, self.row_ptr
        num_nodes, num_edges = row_ptr.numel() - 1, source.numel()
        if num_edges <= max_edges:
            order, pointer = self.source_order, self.source_ptr
            if order is None:
                order = torch.argsort(source, stable=True)
            if pointer is None:
                pointer = _pointer(source.index_select(0, order), self.senders)
            whole = (slice(0, num_nodes), slice(0, num_edges))
            return [EdgeRun(*whole, None, source, target, row_ptr, order, pointer)]
        chunks = []
        for start, stop, first, last in _boundaries(row_ptr, max_edges):
            present, local = torch.unique(source[first:last], return_inverse=True)
            order = torch.argsort(local, stable=True)
            chunks.append(
                EdgeRun(
                    slice(start, stop),
                    slice(first, last),
                    present,
                    local,
                    target[first:last] - start,
                    row_ptr[start : stop + 1] - first,
                    order,
                    _pointer(local.index_select(0, order), present.numel()),
                )
            )
        return chunks


# How an argument or a result relates to a chunk. A node tensor of kind SOURCE arrives gathered to the chunk's edges
# (and is scattered back by addition), TARGET is the slice of the chunk's receivers, EDGE the slice of its edges, WHOLE
# is seen in full (and results of that kind are summed over chunks).
SOURCE, TARGET, EDGE, WHOLE = "source", "target", "edge", "whole"


class Chunk(NamedTuple):
    """A run of receivers with all their edges."""

    nodes: slice
    edges: slice
    source: Tensor  # [e] atom index of each edge's neighbour
    target: Tensor  # [e] receiver, counted from the first receiver of the chunk

    @property
    def num_nodes(self) -> int:
        return self.nodes.stop - self.nodes.start


def make_chunks(row_ptr: Tensor, source: Tensor, target: Tensor, max_edges: int) -> list[Chunk]:
    """Split a receiver-sorted edge list into runs of whole receivers of at most ``max_edges`` edges.

    row_ptr: [N+1]; source, target: [E]. A receiver with more than ``max_edges`` edges gets a chunk of its own.
    """
    num_nodes, num_edges = row_ptr.numel() - 1, source.numel()
    if num_edges <= max_edges:
        return [Chunk(slice(0, num_nodes), slice(0, num_edges), source, target)]
    ptr = row_ptr.tolist()
    chunks, start = [], 0
    while start < num_nodes:
        stop = start + 1
        while stop < num_nodes and ptr[stop + 1] - ptr[start] <= max_edges:
            stop += 1
        edges = slice(ptr[start], ptr[stop])
        chunks.append(Chunk(slice(start, stop), edges, source[edges], target[edges] - start))
        start = stop
    return chunks


def _take(x: Tensor, kind: str, chunk: Chunk) -> Tensor:
    if kind == SOURCE:
        return x.index_select(0, chunk.source)
    if kind == TARGET:
        return x[chunk.nodes]
    return x[chunk.edges] if kind == EDGE else x


@dataclass(frozen=True)
class Plan:
    """A function of one chunk, what its arguments and results are, and where to run it."""

    function: Callable[..., Sequence[Tensor]]
    chunks: Sequence[Chunk]
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    rows: tuple[int | None, ...]  # number of rows of each SOURCE result

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluate all chunks and put the results together."""
        parts: list[list[Tensor]] = [[] for _ in self.results]
        sums: list[Tensor | None] = [None] * len(self.results)
        # detached, or an argument's own history would join two arguments inside a chunk's derivative
        tensors = [t.detach() for t in tensors]
        with torch.no_grad():
            for chunk in self.chunks:
                values = self.function(
                    chunk, *(_take(t, k, chunk) for t, k in zip(tensors, self.arguments, strict=True))
                )
                for n, (value, kind) in enumerate(zip(values, self.results, strict=True)):
                    if kind in (TARGET, EDGE):
                        parts[n].append(value)
                    elif kind == WHOLE:
                        sums[n] = value if sums[n] is None else sums[n] + value
                    else:
                        if sums[n] is None:
                            sums[n] = value.new_zeros((self.rows[n], *value.shape[1:]))
                        sums[n].index_add_(0, chunk.source, value)
        return tuple((p[0] if len(p) == 1 else torch.cat(p)) if p else s for p, s in zip(parts, sums, strict=True))

    def vjp(self, wanted: Sequence[int], tensors: Sequence[Tensor]) -> Plan:
        """The plan of (gradients of the results, arguments) -> gradients of the wanted arguments."""
        function, num_results = self.function, len(self.results)

        def pullback(chunk: Chunk, *args: Tensor) -> list[Tensor]:
            create_graph = torch.is_grad_enabled()
            cotangents, primals = args[:num_results], list(args[num_results:])
            for n in wanted:
                if not primals[n].requires_grad:
                    primals[n] = primals[n].detach().requires_grad_()
            with torch.enable_grad():
                values = function(chunk, *primals)
                used = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
                inputs = [primals[n] for n in wanted]
                if not used:
                    return [torch.zeros_like(x) for x in inputs]
                grads = torch.autograd.grad(
                    [v for v, _ in used],
                    inputs,
                    [c.to(v.dtype) for v, c in used],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]

        kinds = tuple(self.arguments[n] for n in wanted)
        rows = tuple(tensors[n].shape[0] if k == SOURCE else None for n, k in zip(wanted, kinds, strict=True))
        return Plan(pullback, self.chunks, self.results + self.arguments, kinds, rows)


def wanted_inputs(ctx, first: int) -> list[int]:
    """Which inputs of an autograd function, counted from the ``first`` (all tensors), the pass asks for.

    ``needs_input_grad`` only knows which inputs require gradients: while forces are taken with ``autograd.grad(energy,
    positions)`` it is true for every weight. The engine knows better.
    """
    inputs = zip(ctx.needs_input_grad[first:], ctx.next_functions, strict=True)
    return [n for n, (needed, (node, _)) in enumerate(inputs) if needed and node is not None and _runs(node)]


def _runs(node) -> bool:
    """Whether the pass comes to an autograd node."""
    try:
        return will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient the pass itself was asked for
        return True


def evaluate(plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Results of a plan, differentiable to any order: a derivative evaluates the plan of the derivative."""
    return _evaluated_on(tensors[0].device.type).apply(plan, *tensors)


@functools.cache
def _evaluated_on(device_type: str) -> type[torch.autograd.Function]:
    """The autograd function of :func:`evaluate`, whose derivatives run under the autocast of their value."""

    class Evaluated(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=device_type)
        def forward(ctx, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.plan = plan
            ctx.save_for_backward(*tensors)
            return plan.run(tensors)

        @staticmethod
        @torch.amp.custom_bwd(device_type=device_type)
        def backward(ctx, *grads: Tensor):
            tensors = ctx.saved_tensors
            wanted = wanted_inputs(ctx, 1)
            if not wanted:
                return (None,) * (1 + len(tensors))
            out: list[Tensor | None] = [None] * (1 + len(tensors))
            values = evaluate(ctx.plan.vjp(wanted, tensors), *grads, *tensors)
            for n, value in zip(wanted, values, strict=True):
                out[1 + n] = value
            return tuple(out)

    return Evaluated


def chunked(
    function: Callable[..., Tensor],
    chunks: Sequence[Chunk],
    arguments: Sequence[tuple[str, Tensor]],
) -> Tensor:
    """Evaluate ``function(chunk, *gathered_arguments) -> [receivers of the chunk, ...]`` over all chunks.

    function: differentiable per-chunk computation; tensors that need gradients must come in as arguments, whatever
    else it uses it may close over. chunks: from :func:`make_chunks`. arguments: (kind, tensor) in call order.
    Returns the concatenated result for all receivers, differentiable to any order. Working memory is one chunk's.
    """
    return evaluate(plan_of(function, chunks, arguments), *(t for _, t in arguments))[0]


def plan_of(
    function: Callable[..., Tensor],
    chunks: Sequence[Chunk],
    arguments: Sequence[tuple[str, Tensor]],
) -> Plan:
    """The plan behind :func:`chunked`: its ``vjp`` is the plan of the derivative, and so on."""
    kinds = tuple(k for k, _ in arguments)
    return Plan(lambda chunk, *args: (function(chunk, *args),), chunks, kinds, (TARGET,), (None,))
