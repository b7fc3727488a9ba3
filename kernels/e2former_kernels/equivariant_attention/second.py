r"""Second derivative of the attention with fused kernels, chunk by chunk: what training on forces asks for.

The first derivative's results are J^T grad, with J the derivative of the output by (vec, query, key, value). So
L = <c, J^T grad> = <grad, J c>, where J c, the output's change along the cotangents c, is also the gradient of L by
grad. One pass gives value and change of everything (``_dot``: the change), one reverse pass the gradients of both.

Chunks are longer than those of the first derivative (``op.SECOND_NUMBERS``), as a CUDA graph is of one: some 2,800
numbers of working memory for an edge of a network with 128 heads and a radial network 128 wide; more with a
directional gate (``score_directional.py``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.call import Change
from e2former_kernels.common.chunks import EdgeChunk
from e2former_kernels.common.tiles import next_power, row_tiles
from e2former_kernels.equivariant_attention import kernels_geometry as geometry_kernel
from e2former_kernels.equivariant_attention import kernels_second as kernel
from e2former_kernels.equivariant_attention.kernels_value import launch_contract
from e2former_kernels.equivariant_attention.reference import AttentionSpec

if TYPE_CHECKING:
    from e2former_kernels.equivariant_attention.fused import FusedAttention

WEIGHTS_TILE = (64, 2)  # heads and warps of one program of weights_tangent_kernel
WEIGHTS_NUMBERS = 512  # numbers of one tile [edges, heads] of weights_second_kernel
PAIR_TILE = (32, 1)  # heads and warps of one program of pair_sum_second_kernel
# Heads and registers of a thread for the rows of the message kernels (common/tiles.py).
AGGREGATE_TILE = (32, 72)
MESSAGE_TILE = (32, 108)
SENDER_TILE = (32, 72)
_VEC, _QUERY, _KEY, _VALUE, _RADIAL = range(5)  # the tensors of the operation, as in ``fused.py``


class Geometry(NamedTuple):
    """A chunk's edges and their changes."""

    vec: Tensor  # [e, 3]
    vec_dot: Tensor
    distance: Tensor  # [e]
    distance_dot: Tensor
    envelope: Tensor  # [e]
    envelope_dot: Tensor
    scale: Tensor  # [e, B]
    scale_dot: Tensor


class Scores(NamedTuple):
    """A chunk's attention weights and their changes, and the receivers' softmax (``kernels_second.py``)."""

    pair: Tensor  # [e, H]
    pair_dot: Tensor
    weight: Tensor  # [e, H]
    weight_dot: Tensor
    top: Tensor  # [n, H], as the rest
    total: Tensor
    drift: Tensor
    top_dot: Tensor
    best: Tensor  # int64


def _geometry(spec: AttentionSpec, directions: int, vec: Tensor, vec_dot: Tensor) -> Geometry:
    edges = vec.shape[0]
    numbers = [vec.new_empty(edges) for _ in range(4)]
    scale = [vec.new_empty(edges, directions) for _ in range(2)]
    if edges:
        geometry_kernel.geometry_tangent_kernel[(math.ceil(edges / 128),)](
            vec, vec_dot, *numbers, *scale, E=edges, **geometry_kernel.constants_of(spec, directions, 128)
        )
    return Geometry(vec, vec_dot, *numbers, *scale)


def _scores(
    spec: AttentionSpec,
    chunk: EdgeChunk,
    source: Tensor,
    edges: Geometry,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    features: Tensor,
) -> Scores:
    """query, key: value and change; features: [2, e, 1, 2 H]."""
    heads, width = query[0].shape[1:]
    on_edges = features.new_empty(4, chunk.num_edges, heads).unbind(0)
    on_nodes = features.new_empty(4, chunk.num_nodes, heads).unbind(0)
    norm = spec.attention_norm
    best = torch.empty(chunk.num_nodes if norm.maximum else 1, heads, dtype=torch.int64, device=features.device)
    if chunk.num_nodes and heads:
        block = min(next_power(heads), WEIGHTS_TILE[0])
        kernel.weights_tangent_kernel[chunk.num_nodes, math.ceil(heads / block)](
            *(q[chunk.nodes] for q in query), *key, *features, edges.envelope, edges.envelope_dot, source,
            chunk.row_ptr, *on_edges, *on_nodes, best, heads, width, 1.0 / math.sqrt(width), norm.constant,
            **norm.flags, BH=block, BS=next_power(width), num_warps=WEIGHTS_TILE[1],
        )  # fmt: skip
    return Scores(*on_edges, *on_nodes, best)


def _pair_sum(
    scores: Scores,
    x: tuple[Tensor, Tensor],
    index: Tensor,
    order: Tensor | None,
    ptr: Tensor,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """out[n, H, S] = sums over the edges of n of both pairs of gradient and x.

    index: [E], of x. order, ptr: the edges of n; order None: they are in order. rows: where to add them in out instead.
    """
    heads, width = x[0].shape[1:]
    if ptr.numel() > 1 and heads * width:
        block = min(next_power(heads), PAIR_TILE[0])
        kernel.pair_sum_second_kernel[ptr.numel() - 1, math.ceil(heads / block)](
            scores.pair, x[0], scores.pair_dot, x[1], index, index if order is None else order, ptr,
            index if rows is None else rows, out, heads, width,
            BH=block, BS=next_power(width), ORDERED=order is not None, ACCUMULATE=rows is not None,
            num_warps=PAIR_TILE[1],
        )  # fmt: skip


def second_derivative(call: FusedAttention, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor]:
    """``Call.second`` of :class:`FusedAttention` (common/call.py), where no weights are among ``change.wanted``.

    Long: a chunk's launches in order, each of which takes what the ones before it made.
    """
    spec, directions, first_weight, given = call.spec, call.directions, call.first_weight, change.along()
    primal = [t.contiguous() for t in tensors[:first_weight]]
    dots = [given.get(n) for n in range(first_weight)]
    dots = [torch.zeros_like(t) if c is None else c.contiguous() for c, t in zip(dots, primal, strict=True)]
    (vec, vec_dot), query, key, value, *_ = zip(primal, dots, strict=True)
    grad = change.grad.contiguous()
    senders, value_rows, channels = value[0].shape
    heads, width = query[0].shape[1:]
    rows = value_rows * channels // heads
    per_head = [v.view(senders, rows, heads) for v in value]
    weights = any(n > first_weight for n in by)
    by_scale = spec.order > 0 and 1 + _VEC in by
    gate = call.gate(tensors, *dots[_RADIAL:])
    chunks = call.training_chunks()
    fresh = torch.empty_like if len(chunks) == 1 else torch.zeros_like
    by_grad = torch.empty_like(grad) if 0 in by else None
    by_vec = torch.empty_like(vec) if 1 + _VEC in by else None
    by_query = torch.empty_like(query[0]) if 1 + _QUERY in by else None
    by_key = fresh(key[0]) if 1 + _KEY in by else None
    by_value = fresh(value[0]) if 1 + _VALUE in by else None
    tiles = row_tiles(rows, heads, directions, *AGGREGATE_TILE)
    message_tiles = row_tiles(rows, heads, directions, *MESSAGE_TILE)
    sender_tiles = row_tiles(rows, heads, 2, *SENDER_TILE)
    blocks = math.ceil(heads / message_tiles["BH"])
    transposed = call.transposed()

    def of_chunk(chunk: EdgeChunk) -> None:  # a function: nothing of a chunk is there when the next begins
        number, receivers, source = chunk.num_edges, chunk.num_nodes, chunk.source
        edges = _geometry(spec, directions, vec[chunk.edges], vec_dot[chunk.edges])
        features, kept = gate.forward(chunk, edges.vec, edges.distance, edges.vec_dot, edges.distance_dot)
        scores = _scores(spec, chunk, source, edges, query, key, features)
        messages = (scores.weight, scores.weight_dot, edges.scale, edges.scale_dot)
        outer = grad.new_empty(receivers, directions, rows, heads)
        if by_grad is not None:
            if receivers:
                kernel.aggregate_tangent_kernel[receivers, math.ceil(heads / tiles["BH"])](
                    *messages, *per_head, source, chunk.row_ptr, outer, rows, heads, B=directions, **tiles
                )
            if call.coupling is None:
                by_grad[chunk.nodes] = outer.view(receivers, value_rows, channels)
            else:
                summed = outer.view(receivers, -1, channels)
                launch_contract(call.coupling, summed, by_grad[chunk.nodes], call.precision)
        if by == [0]:
            return
        if transposed is None:
            outer = grad[chunk.nodes].view_as(outer)
        else:
            launch_contract(transposed, grad[chunk.nodes], outer.view(receivers, -1, channels), call.precision)
        by_weight = grad.new_empty(2, number, heads)
        sums = grad.new_empty(2, receivers, heads)
        scale_parts = grad.new_empty(blocks if by_scale else 1, number, 2 * directions)
        if receivers:
            kernel.message_second_kernel[receivers, blocks](
                *per_head, outer, *messages, source, chunk.row_ptr, *by_weight, scale_parts, *sums, number, rows,
                heads, B=directions, SCALE=by_scale, **message_tiles,
            )  # fmt: skip
        by_features = torch.empty_like(features)
        by_envelope = [grad.new_empty(number) for _ in range(2)]
        if number:
            padded = next_power(heads)
            block = max(WEIGHTS_NUMBERS // padded, 1)
            kernel.weights_second_kernel[(math.ceil(number / block),)](
                *by_weight, scores.pair, scores.pair_dot, *features, edges.envelope, edges.envelope_dot,
                chunk.target, *scores[4:], *sums, *by_features, *by_envelope, number, heads,
                1.0 / math.sqrt(width), spec.attention_norm.constant,
                **spec.attention_norm.flags, BH=padded, BE=block, num_warps=4,
            )  # fmt: skip
        if by_query is not None:
            _pair_sum(scores, key, source, None, chunk.row_ptr, by_query[chunk.nodes])
        if by_key is not None:
            local = tuple(q[chunk.nodes] for q in query)
            _pair_sum(scores, local, chunk.target, chunk.order, chunk.order_ptr, by_key, chunk.senders)
        if by_value is not None and chunk.order_ptr.numel() > 1:
            grid = chunk.order_ptr.numel() - 1, math.ceil(heads / sender_tiles["BH"])
            kernel.aggregate_transposed_second_kernel[grid](
                *messages, outer, chunk.target, chunk.order, chunk.order_ptr,
                chunk.order if chunk.senders is None else chunk.senders, by_value, rows, heads,
                B=directions, ACCUMULATE=chunk.senders is not None, **sender_tiles,
            )  # fmt: skip
        if by_vec is None and all(n <= _RADIAL for n in by):
            return
        del scores, messages, by_weight, outer, features  # the last pass needs as much
        by_distance, by_distance_dot, by_harmonics = gate.backward(by_features, kept, weights, by_vec is not None)
        if by_vec is not None and number:
            geometry_kernel.geometry_second_kernel[(math.ceil(number / 128),)](
                edges.vec, edges.vec_dot, by_distance, by_distance_dot, *by_envelope, scale_parts,
                by_vec[chunk.edges], E=number, tiles=blocks, **geometry_kernel.constants_of(spec, directions, 128),
            )  # fmt: skip
            if by_harmonics is not None:
                gate.add_by_vec(by_harmonics, kept, by_vec[chunk.edges])

    for chunk in chunks:
        of_chunk(chunk)
    found = [by_grad, by_vec, by_query, by_key, by_value, *gate.found()]
    return [found[n] for n in by]
