"""Runs of receivers with everything a kernel needs to know about their edges, made once per graph by its `EdgeList`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_RUN_EDGES = 64  # however wide the network


class EdgeChunk(NamedTuple):
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
    image_chunk: EdgeChunk | None = None

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


class LazyPlan(Sequence[EdgeChunk]):
    """Runs that are made when somebody asks for them: most evaluations never do."""

    def __init__(self, make: Callable[[], list[EdgeChunk]]) -> None:
        self._make, self._made = make, None

    def _chunks(self) -> list[EdgeChunk]:
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
        self._runs: dict[int, list[EdgeChunk]] = {}
        self._elements: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def runs(self, max_edges: int) -> list[EdgeChunk]:
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

    def elements(self, chunk: EdgeChunk) -> tuple[Tensor, Tensor]:
        """Atomic numbers of receiver and sender of every edge of a run, [e] each."""
        key = chunk.nodes.start, chunk.nodes.stop
        if key not in self._elements:
            receivers = self.species[chunk.nodes].index_select(0, chunk.target)
            self._elements[key] = receivers, self.species.index_select(0, self.source[chunk.edges])
        return self._elements[key]

    def _build(self, max_edges: int) -> list[EdgeChunk]:
        source, target, row_ptr = self.source, self.target, self.row_ptr
        num_nodes, num_edges = row_ptr.numel() - 1, source.numel()
        if num_edges <= max_edges:
            order, pointer = self.source_order, self.source_ptr
            if order is None:
                order = torch.argsort(source, stable=True)
            if pointer is None:
                pointer = _pointer(source.index_select(0, order), self.senders)
            whole = (slice(0, num_nodes), slice(0, num_edges))
            return [EdgeChunk(*whole, None, source, target, row_ptr, order, pointer)]
        chunks = []
        for start, stop, first, last in _boundaries(row_ptr, max_edges):
            present, local = torch.unique(source[first:last], return_inverse=True)
            order = torch.argsort(local, stable=True)
            chunks.append(
                EdgeChunk(
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
