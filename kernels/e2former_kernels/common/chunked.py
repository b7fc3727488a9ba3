"""Evaluate a function of edges chunk by chunk, and its derivatives of any order too, by recomputation.

A message-passing step is a sum over edges. Sorted by receiver, the edges split into runs of whole receivers, and
the step splits with them: its value, its vector-Jacobian product, the product's own vector-Jacobian product, and so
on, are all "for every run: gather, compute, scatter". :func:`chunked` uses this one observation for all of them, so
no tensor with an edge dimension outlives its chunk in forward, backward, double backward or beyond, while the
per-edge computation is written once, as ordinary differentiable PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.compat import will_engine_execute_node

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
