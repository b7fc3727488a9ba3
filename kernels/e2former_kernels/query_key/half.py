r"""Queries and keys and their gradient by h with float16 products, for frozen weights where TF32 is allowed.

The passes of ``op.py`` without tangent and without weights. Products of size rows x 4 G are most of the operation's
time and bound by memory; here they, and the rows of every other product, are float16 with a factor per row
(``common/half.py``), which the kernels between the products read and write.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.chunks import NodeChunk, node_chunks
from e2former_kernels.common.half import Rows, from_products, half_matrices, half_rows, half_weight, new_rows
from e2former_kernels.common.tiles import next_power
from e2former_kernels.linear.op import apply_so3, so3_rows
from e2former_kernels.query_key import kernels as kernel
from e2former_kernels.query_key.reference import LAYER_NORM_EPS, QueryKeyWeights

# Working memory of a chunk of nodes, in bytes: half of the nodes' within these limits. More chunks cost launches, and
# where a few of them take all the memory that the rest of a layer leaves, fewer are no faster.
LEAST_BYTES = 1 << 27
MOST_BYTES = 1 << 29
TRAINING_BYTES = 1 << 30  # of a chunk in training, whose second derivatives keep more beside
SMALLEST = 1e-37  # bound of a gradient that is zero
TILE_NUMBERS = 1024  # numbers of one tile of the hidden layer's kernels


class HalfWeights(NamedTuple):
    """Weights as the products take them. rows: [M, 4 G, C]; degrees: [L+1], their factors; row_factors: [M], the same.

    largest: [2], products of a node are at most entry 0 times its factor plus entry 1. hidden, out: [2, ...] with
    factors [2].
    """

    given: QueryKeyWeights
    rows: Tensor
    degrees: Tensor
    row_factors: Tensor
    largest: Tensor
    hidden: Rows
    out: Rows


class Chunk(NamedTuple):
    """What n nodes keep for their gradient: products P [M, n, 4 G] and those of the hidden layer [2, n, G]."""

    both: Tensor
    middle: Rows  # the factors are of the layer's inputs
    hidden: Rows


def half_weights(weights: QueryKeyWeights) -> HalfWeights:
    """What the products take, made of weights that do not change."""
    weight, degrees = half_weight(weights.weight)
    channels = weights.weight.shape[-1]  # rows are at most 1, weights too

    bound = torch.stack([channels * degrees.max(), weights.bias.abs().max()])
    hidden, out = (Rows(*half_weight(w)) for w in (weights.hidden_weight, weights.out_weight))
    return HalfWeights(weights, so3_rows(weight), degrees, so3_rows(degrees), bound, hidden, out)


@functools.lru_cache(maxsize=64)
def chunks(nodes: int, size: int, trained: bool = False) -> Sequence[NodeChunk]:
    """Chunks of nodes whose products P take ``size`` bytes each; longer ones in training."""
    budget = TRAINING_BYTES if trained else min(max(nodes * size // 2, LEAST_BYTES), MOST_BYTES)
    return node_chunks(nodes, max(-(-budget // size), 16)) if nodes else ()


def _invariants_launch(weights: HalfWeights) -> dict:
    """All columns of a node in one program, which knows the largest."""
    width, degrees = weights.given.bias.shape[0], weights.degrees.shape[0]
    block = next_power(width)
    return {"D": degrees, "BG": block, "num_warps": 8 if block > 1024 else 4}


def _layer(nodes: int, weights: HalfWeights) -> tuple[tuple[int, int], dict]:
    width = weights.given.hidden_bias.shape[1]
    padded = next_power(width)
    block = max(TILE_NUMBERS // padded, 1)
    constants = {"EPS": LAYER_NORM_EPS, "BW": padded, "BE": block, "num_warps": 4}
    return (math.ceil(nodes / block), 2), constants


def _norm_weights(weights: HalfWeights) -> tuple[Tensor, Tensor, Tensor]:
    return weights.given.hidden_bias, weights.given.norm_weight, weights.given.norm_bias


def _forward_chunk(h: Rows, weights: HalfWeights) -> Chunk:
    nodes, rows, _ = h.numbers.shape
    width, inputs = weights.given.hidden_weight.shape[1:]
    both = h.numbers.new_empty(rows, nodes, weights.rows.shape[1])
    apply_so3(h.numbers, weights.rows, False, both.transpose(0, 1))
    s, hidden = (new_rows(h.factor, 2, nodes, n, leading=2) for n in (inputs, width))
    columns = weights.given.bias.shape[0]
    kernel.half_invariants_kernel[(nodes,)](
        both, weights.given.bias, *s, h.factor, weights.degrees, nodes, columns, **_invariants_launch(weights)
    )
    middle = Rows(torch.bmm(s.numbers, weights.hidden.numbers.transpose(1, 2)), s.factor)
    grid, constants = _layer(nodes, weights)
    kernel.half_layer_kernel[grid](
        *middle, weights.hidden.factor, *_norm_weights(weights), *hidden, nodes, width, **constants
    )
    return Chunk(both, middle, hidden)


def _reverse_chunk(grad: Rows, h: Rows, chunk: Chunk, weights: HalfWeights, bounds: Tensor) -> None:
    """h's numbers become the gradient by h over ``bounds`` [n] and row_factors. grad: [2, n, O]. Uses up ``chunk``."""
    nodes, width = bounds.shape[0], weights.given.hidden_weight.shape[1]
    columns = weights.given.bias.shape[0]
    by_hidden = torch.bmm(grad.numbers, weights.out.numbers)
    up = chunk.hidden  # nothing reads it any more
    grid, constants = _layer(nodes, weights)
    kernel.half_layer_backward_kernel[grid](
        by_hidden, grad.factor.contiguous(), weights.out.factor, *chunk.middle, weights.hidden.factor,
        *_norm_weights(weights), *up, nodes, width, **constants,
    )  # fmt: skip
    by_s = torch.bmm(up.numbers, weights.hidden.numbers)
    kernel.half_invariants_backward_kernel[(nodes,)](
        chunk.both, weights.given.bias, by_s, up.factor, weights.hidden.factor, h.factor, weights.degrees,
        weights.largest, bounds, nodes, columns, SMALLEST, **_invariants_launch(weights),
    )  # fmt: skip
    apply_so3(chunk.both.transpose(0, 1), weights.rows, True, h.numbers)


def query_key_products(h: Rows, weights: HalfWeights) -> Rows:
    """Products of the last layer [2, N, O], without its bias, and their factors [2, N]. h: [N, M, C]."""
    products = new_rows(h.factor, 2, h.numbers.shape[0], weights.given.out_weight.shape[1], leading=2)
    for (nodes,) in chunks(h.factor.numel(), weights.rows[..., 0].nbytes):
        hidden = _forward_chunk(Rows(*(t[nodes] for t in h)), weights).hidden
        torch.bmm(hidden.numbers, weights.out.numbers.transpose(1, 2), out=products.numbers[:, nodes])
        products.factor[:, nodes] = hidden.factor
    return products


def query_key_reverse(grad: Rows, h: Rows, weights: HalfWeights) -> Rows:
    """Gradient by h of <grad, queries and keys>, times ``row_factors`` of the weights. grad: [2, N, O].

    Uses up h: its numbers become the gradient's.
    """
    bounds = torch.empty_like(h.factor)
    for (nodes,) in chunks(h.factor.numel(), weights.rows[..., 0].nbytes):
        part = Rows(*(t[nodes] for t in h))
        _reverse_chunk(Rows(*(t[:, nodes] for t in grad)), part, _forward_chunk(part, weights), weights, bounds[nodes])
    return Rows(h.numbers, bounds)


def query_key_value(h: Tensor, half: HalfWeights) -> Tensor:
    """Queries and keys, [2, N, O]. h: [N, M, C], contiguous."""
    products, factor = query_key_products(half_rows(h), half)
    out = h.new_empty(products.shape)
    from_products(products.transpose(0, 1), factor.t(), half.out.factor, out.transpose(0, 1), half.given.out_bias)
    return out


def query_key_gradient(grad: Tensor, h: Tensor, half: HalfWeights) -> Tensor:
    """Gradient by h of <grad, queries and keys>. grad: [N, 2, O]; h: [N, M, C], contiguous."""
    products, factor = query_key_reverse(half_matrices(grad.transpose(0, 1)), half_rows(h), half)
    return from_products(products, factor, half.row_factors, torch.empty_like(h))
