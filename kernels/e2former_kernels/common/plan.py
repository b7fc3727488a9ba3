"""Runs of receivers with everything a kernel needs to know about their edges, made once per graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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


def _build(
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    source_order: Tensor | None,
    source_ptr: Tensor | None,
    max_edges: int,
    senders: int | None,
) -> list[EdgeChunk]:
    num_nodes, num_edges = row_ptr.numel() - 1, source.numel()
    num_senders = num_nodes if senders is None else senders
    if num_edges <= max_edges:
        if source_order is None:
            source_order = torch.argsort(source, stable=True)
        if source_ptr is None:
            source_ptr = _pointer(source.index_select(0, source_order), num_senders)
        whole = (slice(0, num_nodes), slice(0, num_edges))
        return [EdgeChunk(*whole, None, source, target, row_ptr, source_order, source_ptr)]
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
    """More edges than one run takes, inside :func:`one_run_only`."""


_one_run_only = False


@contextlib.contextmanager
def one_run_only() -> Iterator[None]:
    """Plans made inside depend on the number of edges alone, not on the edges: :class:`SeveralRuns` where they would.

    For CUDA graphs, whose replays see other edges in the same memory.
    """
    global _one_run_only
    before, _one_run_only = _one_run_only, True
    try:
        yield
    finally:
        _one_run_only = before


# source tensor -> {(row_ptr identity, its version, size of a run): runs}; an entry goes when its source tensor goes
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def edge_plan(
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    source_order: Tensor | None,
    source_ptr: Tensor | None,
    max_edges: int,
    senders: int | None = None,
) -> list[EdgeChunk]:
    """Split a receiver-sorted edge list into runs of whole receivers of at most ``max_edges`` edges.

    source, target: [E]; row_ptr: [N+1]; source_order [E], source_ptr [N+1]: the transposed list, made here when None.
    senders: number of rows that ``source`` counts, when they are not the receivers' atoms.
    A receiver with more than ``max_edges`` edges gets a run of its own. The result is kept as long as ``source`` lives,
    so the layers of a network and their derivatives share it.
    """
    known = _plans.get(source)
    if known is None:
        known = _plans[source] = {}
    if _one_run_only and source.numel() > max_edges:
        raise SeveralRuns(f"{source.numel()} edges, {max_edges} in a run")
    key = (row_ptr.data_ptr(), source._version, row_ptr._version, max_edges)
    if key not in known:
        if len(known) >= 8:
            known.clear()
        with torch.no_grad():
            known[key] = _build(source, target, row_ptr, source_order, source_ptr, max_edges, senders)
    return known[key]


# a run's targets -> (what it was made of, elements of receivers and of senders of the run's edges). The tensors it was
# made of are kept, so that their addresses are nobody else's.
_elements: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def edge_elements(chunk: EdgeChunk, source: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the element tables for receiver and sender of every edge of a run, [e] each; kept for the layers.

    source: [E] of the whole graph, rows of ``species``.
    """
    made_of = (source.data_ptr(), source._version, species.data_ptr(), species._version, chunk.nodes.start)
    known = _elements.get(chunk.target)
    capturing = source.is_cuda and torch.cuda.is_current_stream_capturing()  # replays see other elements
    if known is None or known[0] != made_of or capturing:
        receivers = species[chunk.nodes].index_select(0, chunk.target)
        senders = species.index_select(0, source[chunk.edges])
        known = made_of, (receivers, senders), (source, species)
        if not capturing:
            _elements[chunk.target] = known
    return known[1]
