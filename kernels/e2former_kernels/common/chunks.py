"""Edges in chunks of whole receivers: what kernels need to know of one, and functions of edges, chunk by chunk.

Messages are summed over edges. Sorted by receiver, the edges split into chunks of whole receivers, and the
sum splits with them: its value, its vector-Jacobian product, the product's own vector-Jacobian product, and so on, are
all "for every chunk: gather, compute, scatter". :class:`Plan` uses this one observation for all of them, so no tensor
with an edge dimension outlives its chunk in forward, backward, double backward or beyond, while the per-edge
computation is written once, as ordinary differentiable PyTorch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MIN_CHUNK_EDGES = 64  # however wide the network
MAX_CHUNK_NODES = 8192  # nodes worked on at a time by operations on nodes


class NodeChunk(NamedTuple):
    """Consecutive nodes."""

    nodes: slice


@functools.lru_cache(maxsize=64)
def node_chunks(number: int, size: int = MAX_CHUNK_NODES) -> Sequence[NodeChunk]:
    """All nodes in as few chunks of at most ``size`` as there can be, of equal length."""
    chunks = max(-(-number // size), 1)
    bounds = [number * n // chunks for n in range(chunks + 1)]
    return tuple(NodeChunk(slice(*pair)) for pair in itertools.pairwise(bounds))


@dataclass(frozen=True, eq=False)
class EdgeChunk:
    """A chunk of receivers and all their edges.

    nodes, edges: slices of the receivers and of the edge list, and their lengths. source: [e] sender of each edge.
    target: [e] receiver from the chunk's first. row_ptr: [n+1]. species: of all atoms. senders: [s] atoms that send to
    this chunk, ascending, or None where every atom counts (one chunk for the whole graph). order, order_ptr: [e],
    [s+1], the chunk's edges sorted by sender.
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
    """(first node, last node + 1, first edge, last edge + 1) of chunks of at most ``max_edges`` edges."""
    ptr = row_ptr.cpu()
    nodes, bounds, start = ptr.numel() - 1, [], 0
    while start < nodes:
        first = int(ptr[start])
        stop = int(torch.searchsorted(ptr, first + max_edges, right=True)) - 1
        stop = min(max(stop, start + 1), nodes)
        bounds.append((start, stop, first, int(ptr[stop])))
        start = stop
    return bounds


class SeveralChunks(RuntimeError):
    """More edges than one chunk takes, of an :class:`EdgeList` with ``one_chunk``."""


class EdgeList:
    """The edges of one graph, and what operations on them need beside: made when it is asked for, and kept here.

    Args:
        source, target: [E] int64, sender and receiver of every edge; ``target`` ascends.
        row_ptr: [N+1], the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
        species: [N'], atomic numbers of the senders; receivers come first.
        transpose: gives the stable permutation [E] that sorts the edges by sender and its pointer [senders + 1]; made
            here when None.
        one_chunk: all that is made depends on the number of edges alone, not on the edges. For CUDA graphs, whose
            replays see other edges in the same memory. A number above one: for up to so many times the edges that a
            chunk takes otherwise; :class:`SeveralChunks` for more.
        max_edges: of a chunk; None: what fits in a working memory that does not depend on the number of edges.
    """

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        row_ptr: Tensor,
        species: Tensor,
        transpose: Callable[[], tuple[Tensor, Tensor]] | None = None,
        *,
        one_chunk: int = 0,
        max_edges: int | None = None,
    ) -> None:
        index = (source, target, row_ptr, species)
        self.source, self.target, self.row_ptr, self.species = (t.contiguous() for t in index)
        self.transpose, self.one_chunk, self.max_edges = transpose, one_chunk, max_edges
        self._chunks: dict[int, list[EdgeChunk]] = {}

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

    def chunks(self, numbers: int, budget: int, single: int | None = None) -> list[EdgeChunk]:
        """Chunks of whole receivers whose edges take at most ``budget`` numbers; a receiver with more gets its own.

        numbers: working memory of an edge. single: all edges are one chunk where they take at most so many (default:
        the budget). One chunk needs no list of its senders and can be captured in a CUDA graph.
        """
        edges = max(self.source.numel(), 1)
        if self.max_edges is not None:
            size = self.max_edges
        elif edges * numbers <= (budget if single is None else single):
            size = edges
        else:
            size = max(budget // numbers, MIN_CHUNK_EDGES)
        return self.chunks_of(size)

    def chunks_of(self, max_edges: int) -> list[EdgeChunk]:
        """Chunks of whole receivers with at most ``max_edges`` edges; a receiver with more gets a chunk of its own."""
        max_edges = min(max_edges, max(self.source.numel(), 1))  # one chunk is one chunk
        if self.one_chunk:
            if self.source.numel() > self.one_chunk * max_edges:
                raise SeveralChunks(f"{self.source.numel()} edges, {max_edges} in a chunk")
            max_edges = max(self.source.numel(), 1)
        if max_edges not in self._chunks:
            with torch.no_grad():
                self._chunks[max_edges] = self._build(max_edges)
        return self._chunks[max_edges]

    def _build(self, max_edges: int) -> list[EdgeChunk]:
        source, target, row_ptr = self.source, self.target, self.row_ptr
        nodes, edges, chunks = row_ptr.numel() - 1, source.numel(), []
        if edges <= max_edges:
            whole = slice(0, nodes), slice(0, edges), nodes, edges
            return [EdgeChunk(*whole, source, target, row_ptr, self.species, None, *self.by_sender())]
        for start, stop, first, last in _boundaries(row_ptr, max_edges):
            senders, local = torch.unique(source[first:last], return_inverse=True)
            order = torch.argsort(local, stable=True)
            places = slice(start, stop), slice(first, last), stop - start, last - first
            own = source[first:last], target[first:last] - start, row_ptr[start : stop + 1] - first
            pointer = _pointer(local.index_select(0, order), senders.numel())
            chunks.append(EdgeChunk(*places, *own, self.species, senders, order, pointer))
        return chunks


# How an argument or a result relates to a chunk. A node tensor of kind SOURCE arrives gathered to the chunk's edges
# (and is scattered back by addition), TARGET is the slice of the chunk's receivers, EDGE the slice of its edges, WHOLE
# is seen in full (and results of that kind are summed over chunks).
SOURCE, TARGET, EDGE, WHOLE = "source", "target", "edge", "whole"


def _take(x: Tensor, kind: str, chunk: EdgeChunk | NodeChunk) -> Tensor:
    if kind == SOURCE:
        return x.index_select(0, chunk.source)
    if kind == TARGET:
        return x[chunk.nodes]
    return x[chunk.edges] if kind == EDGE else x


@dataclass(frozen=True)
class Plan:
    """A function of one chunk, what its arguments and results are, and the chunks."""

    function: Callable[..., Sequence[Tensor]]
    chunks: Sequence[EdgeChunk | NodeChunk]
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    rows: tuple[int | None, ...]  # number of rows of each SOURCE result

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of all chunks, put together."""
        parts: list[list[Tensor]] = [[] for _ in self.results]
        sums: list[Tensor | None] = [None] * len(self.results)
        # detached, or an argument's own history would join two arguments inside a chunk's derivative
        tensors = [t.detach() for t in tensors]
        with torch.no_grad():
            for chunk in self.chunks:
                given = [_take(t, k, chunk) for t, k in zip(tensors, self.arguments, strict=True)]
                values = self.function(chunk, *given)
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

        def pullback(chunk: EdgeChunk | NodeChunk, *args: Tensor) -> list[Tensor]:
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
                outputs, given = zip(*((v, c.to(v.dtype)) for v, c in used), strict=True)
                options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
                return list(torch.autograd.grad(outputs, inputs, given, **options))

        kinds = tuple(self.arguments[n] for n in wanted)
        rows = tuple(tensors[n].shape[0] if k == SOURCE else None for n, k in zip(wanted, kinds, strict=True))
        return Plan(pullback, self.chunks, self.results + self.arguments, kinds, rows)


def plan_of(
    function: Callable[..., Tensor], chunks: Sequence[EdgeChunk | NodeChunk], arguments: Sequence[tuple[str, Tensor]]
) -> Plan:
    """The plan of ``function(chunk, *arguments) -> [receivers of the chunk, ...]``.

    function: differentiable; tensors that need gradients must come in as arguments, whatever else it uses it may close
    over. arguments: (kind, tensor) in call order.
    """
    kinds = tuple(k for k, _ in arguments)
    return Plan(lambda chunk, *args: (function(chunk, *args),), chunks, kinds, (TARGET,), (None,))
