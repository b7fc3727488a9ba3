"""A block's attention as one function of float16 rows: frozen weights, where TF32 is allowed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_fairchem.nn.convolution import Convolution
from e2former_kernels.common.precision import half_products

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph
    from e2former_fairchem.nn.block import TransformerBlock

__all__ = ["half_attention", "serves"]


def serves(block: TransformerBlock, x: Tensor, system: Tensor, graph: Graph, convolution: Convolution) -> bool:
    """Whether :func:`half_attention` covers an evaluation; ``compute_again`` says that weights are frozen."""
    attention = block.attention
    return (
        convolution.backend == "triton"
        and convolution.compute_again
        and convolution.form == "relative"
        and attention.spec.order == 1
        and attention.dot is None
        and attention.one_map
        and half_products(x)
        and graph.vec.dtype == torch.float32
        and graph.halo is None
        and not system.requires_grad
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


@torch.compiler.disable
def half_attention(
    block: TransformerBlock, x: Tensor, system: Tensor, atomic_numbers: Tensor, graph: Graph, convolution: Convolution
) -> Tensor:
    """x + attention(norm1(x) + system). x: [N, (lmax+1)^2, C]; system: [N, C]; atomic_numbers: [N]."""
    from e2former_kernels.equivariant_attention.half_block import BlockWeights, HalfBlock, attention_block
    from e2former_kernels.equivariant_attention.op import GraphTensors, Pieces, make_step

    attention, norm = block.attention, block.norm1
    spec, nodes = attention.spec, x.shape[0]
    radial, table = attention.radial_and_table(convolution)
    nothing = x.new_empty(1)  # the step's queries, keys and values are rows that the block makes
    heads = nothing.expand(nodes, spec.num_heads, attention.query_key.head_dim)
    pieces = Pieces(graph.vec, heads, heads, nothing.expand(x.shape), None, None, radial, None)
    tensors = GraphTensors(
        graph.source, graph.target, graph.row_ptr, atomic_numbers, attention.coupling, graph.source_order,
        graph.source_ptr, None,
    )  # fmt: skip
    step = make_step(spec, pieces, tensors, "relative", table, edges=graph.edge_list(atomic_numbers))
    weights = BlockWeights(
        norm.affine_weight,
        norm.affine_bias,
        attention.query_key.weights(),
        attention.value.weight,
        attention.value.bias,
        attention.behind_paths(),
        attention.out.bias,
    )
    half = HalfBlock(step, [t for _, t in pieces.flat()], weights, system)
    operations = partial(block.attend, system, atomic_numbers, graph, convolution, None)
    return attention_block(half, operations, x, graph.vec)
