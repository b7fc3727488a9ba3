"""A block's attention as one function of float16 rows: frozen weights, where TF32 is allowed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_fairchem.execution import Execution

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph
    from e2former_fairchem.nn.block import TransformerBlock
    from e2former_kernels.equivariant_attention.half import BlockWeights

__all__ = ["half_attention", "serves"]


def serves(block: TransformerBlock, execution: Execution) -> bool:
    """Whether :func:`half_attention` covers a block of an execution with float16 rows."""
    attention = block.attention
    return (
        execution.recompute_features
        and execution.form == "relative"
        and attention.spec.order == 1
        and attention.dot is None
        and attention.one_map
    )


def _weights(block: TransformerBlock, execution: Execution) -> BlockWeights:
    from e2former_kernels.equivariant_attention.half import block_weights

    attention, norm = block.attention, block.norm1
    query_key = attention.query_key.prepared(execution)
    return execution.made(
        block,
        "half",
        lambda: block_weights(
            norm.affine_weight,
            norm.affine_bias,
            query_key,
            attention.value.weight,
            attention.value.bias,
            attention.behind_paths(execution.mode.precision),
            attention.out.bias,
            attention.coupling,
        ),
    )


@torch.compiler.disable
def half_attention(block: TransformerBlock, x: Tensor, system: Tensor, graph: Graph, execution: Execution) -> Tensor:
    """x + attention(norm1(x) + system). x: [N, (lmax+1)^2, C]; system: [N, C]."""
    from e2former_kernels.equivariant_attention.half import HalfAttention, attention_block
    from e2former_kernels.equivariant_attention.op import Pieces, make_call

    attention = block.attention
    spec, nodes = attention.spec, x.shape[0]
    radial, splines = attention.radial_and_splines(execution)
    nothing = x.new_empty(1)  # the call's queries, keys and values are rows that the block makes
    heads = nothing.expand(nodes, spec.num_heads, attention.query_key.head_dim)
    pieces = Pieces(graph.vec, heads, heads, nothing.expand(x.shape), None, radial, None)
    call = make_call(spec, pieces, execution.edges, attention.coupling, "relative", execution.mode, splines, half=True)
    half = HalfAttention(call, [t for _, t in pieces.flat()], _weights(block, execution), system)
    operations = partial(block.attend, system, graph, execution, None)
    return attention_block(half, operations, x, graph.vec)
