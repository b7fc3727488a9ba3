r"""x + attention of the normalised x as one function of node features and edge vectors, with float16 rows throughout.

For score ``qk`` and messages of order 1 with frozen weights where TF32 is allowed. What the operations of
:mod:`e2former_kernels` do one after another with float32 tensors between them is done here with rows of float16 and a
factor per node (``common/half.py``), which the kernels between the products read and write; gradients that meet are
added where they are read. Second derivatives go through the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.chunks import EdgeChunk
from e2former_kernels.common.half import (
    Rows,
    from_products,
    half_rows,
    half_weight,
    new_rows,
    row_bias,
    rows_from_products,
)
from e2former_kernels.equivariant_attention.fused import FusedAttention, Given
from e2former_kernels.equivariant_attention.kernels_value import contract_rows, launch_contract
from e2former_kernels.layer_norm.op import launch_norm_rows, launch_norm_rows_reverse
from e2former_kernels.linear.op import apply_groups, apply_so3, so3_rows
from e2former_kernels.query_key.half import HalfWeights, query_key_products, query_key_reverse

__all__ = ["BlockWeights", "HalfAttention", "attention_block"]


class _OutMap(NamedTuple):
    """The map behind the attention. weights: float16, of each degree; factors: of the rows of its result, [M].

    back: the transposed coupling [3 M, P], by path rows times their degree's factor over the largest one; largest: [].
    """

    weights: list[Tensor]
    factors: Tensor
    back: Tensor
    largest: Tensor


class BlockWeights(NamedTuple):
    """What the block reads, made of frozen weights.

    norm_weight: [L+1, C]; norm_bias: [C]; value: of rows, [M, C, C]; value_bias, out_bias: of rows, [M, C].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    query_key: HalfWeights
    value: Rows
    value_bias: Tensor
    out: _OutMap
    out_bias: Tensor


def block_weights(
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_key: HalfWeights,
    value_weight: Tensor,
    value_bias: Tensor,
    out: Sequence[Tensor],
    out_bias: Tensor,
    coupling: Tensor,
) -> BlockWeights:
    """What the block reads.

    norm_weight: [L+1, C]; norm_bias, value_bias, out_bias: [C]; value_weight: [L+1, C, C]; coupling: [P, 3, M]. out: of
    each degree, [C, paths C]: from the path rows that lead to a row of the degree to that row of the result.
    """
    channels, rows = out[0].shape[0], value_weight.shape[0] ** 2
    halves = [half_weight(w.unsqueeze(0)) for w in out]
    factors = torch.cat([factor for _, factor in halves])
    paths = [(2 * l + 1) * (w.shape[1] // channels) for l, w in enumerate(out)]
    of_path = torch.cat([f.expand(n) for f, n in zip(factors, paths, strict=True)])
    largest = factors.max()
    back = (coupling.flatten(1) * (of_path / largest).unsqueeze(1)).t().contiguous()
    value, degrees = half_weight(value_weight)
    return BlockWeights(
        norm_weight,
        norm_bias,
        query_key,
        Rows(so3_rows(value), so3_rows(degrees)),
        row_bias(value_bias, rows),
        _OutMap([w.squeeze(0) for w, _ in halves], so3_rows(factors), back, largest),
        row_bias(out_bias, rows),
    )


class HalfAttention:
    """The function for one graph.

    call: the attention over the graph. tensors: those of the operation, for the weights of its features; queries, keys
    and values among them are not read. shift: [N, C], added to the scalar row of the norm.
    """

    def __init__(
        self, call: FusedAttention, tensors: list[Tensor], weights: BlockWeights, shift: Tensor | None
    ) -> None:
        self.call, self.tensors, self.weights, self.shift = call, tensors, weights, shift
        self.query_key, self.value, self.out = weights.query_key, weights.value, weights.out
        self.degrees = [2 * l + 1 for l in range(len(weights.out.weights))]
        self.kept: tuple[Rows, Rows] | None = None  # queries and keys

    def _normal(self, x: Tensor) -> Rows:
        return launch_norm_rows(x, self.weights.norm_weight, self.weights.norm_bias, self.shift)

    def _values(self, h: Rows) -> Rows:
        products = apply_so3(h.numbers, self.value.numbers, False, torch.empty_like(h.numbers))
        return rows_from_products(products, h.factor, self.value.factor, self.weights.value_bias)

    def _queries_and_keys(self, h: Rows) -> tuple[Rows, Rows]:
        products, bias = query_key_products(h, self.query_key), self.query_key.given.out_bias
        heads = self.call.spec.num_heads
        rows = [
            rows_from_products(p.unsqueeze(1), f, self.query_key.out.factor[n : n + 1], bias[n])
            for n, (p, f) in enumerate(zip(*products, strict=True))
        ]
        return tuple(Rows(r.numbers.view(r.numbers.shape[0], heads, -1), r.factor) for r in rows)

    def evaluate(self, x: Tensor, vec: Tensor) -> Tensor:
        """The function. x: [N, M, C], contiguous; vec: [E, 3]. Keeps what :meth:`gradients` takes over."""
        h = self._normal(x)
        query, key = self._queries_and_keys(h)
        given = Given(vec, query, key, self._values(h))
        y, channels = torch.empty_like(x), x.shape[2]
        bias = self.weights.out_bias
        del h

        def finish(chunk: EdgeChunk, outer: Tensor) -> None:
            summed = outer.view(chunk.num_nodes, -1, channels)
            rows, factor = contract_rows(self.call.coupling, summed, self.call.precision)
            products = rows.new_empty(chunk.num_nodes, *x.shape[1:])
            apply_groups(rows.flatten(1), self.out.weights, self.degrees, False, products.flatten(1))
            from_products(products, factor, self.out.factors, y[chunk.nodes], bias, x[chunk.nodes])

        self.call.value_of_chunks(given, self.tensors, finish, None)
        self.kept = query, key
        return y

    def gradients(self, grad: Tensor, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by x and vec of <grad, the function>, once after :meth:`evaluate`. grad, x: contiguous."""
        h = self._normal(x)
        given = Given(vec, *self.kept, self._values(h))
        channels, coupling = x.shape[2], self.out.back
        paths = coupling.shape[1]

        def outer(chunk: EdgeChunk) -> Rows:
            rows, factor = half_rows(grad[chunk.nodes])
            products = rows.new_empty(chunk.num_nodes, paths, channels)
            apply_groups(rows.flatten(1), self.out.weights, self.degrees, True, products.flatten(1))
            into = rows.new_empty(chunk.num_nodes, coupling.shape[0], channels)
            launch_contract(coupling, products, into, self.call.precision)
            return Rows(into, factor * self.out.largest)

        found = self.call.gradients_of_chunks(given, outer, self.tensors, [0, 1, 2, 3])
        del given
        by_vec, by_query, by_key, by_value = found
        del found
        value = half_rows(by_value)
        del by_value
        through_value = Rows(
            apply_so3(value.numbers, self.value.numbers, True, value.numbers.new_empty(x.shape)), value.factor
        )
        both = new_rows(x, 2, x.shape[0], by_query[0].numel(), leading=2)
        for part, (numbers, factor) in zip((by_query, by_key), zip(*both, strict=True), strict=True):
            half_rows(part.flatten(1), Rows(numbers, factor))
        through_scores = query_key_reverse(both, h, self.query_key)
        by_x = launch_norm_rows_reverse(
            x, self.weights.norm_weight, through_scores, self.query_key.row_factors, grad, torch.empty_like(x),
            (through_value, self.value.factor),
        )  # fmt: skip
        return by_x, by_vec


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, block: HalfAttention, operations: Callable[[Tensor, Tensor], Tensor], x: Tensor, vec: Tensor
    ) -> Tensor:
        ctx.block, ctx.operations = block, operations
        x = x.contiguous()
        ctx.save_for_backward(x, vec)
        return block.evaluate(x, vec)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, vec = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, *ctx.block.gradients(grad.contiguous(), x, vec)
        wanted = [n for n, need in enumerate(ctx.needs_input_grad[2:]) if need]
        given = x.view_as(x), vec.view_as(vec)  # x depends on vec by the layers before: not through these
        found = torch.autograd.grad(ctx.operations(*given), [given[n] for n in wanted], grad, create_graph=True)
        by = dict(zip(wanted, found, strict=True))
        return None, None, by.get(0), by.get(1)


def attention_block(
    block: HalfAttention, operations: Callable[[Tensor, Tensor], Tensor], x: Tensor, vec: Tensor
) -> Tensor:
    """The function of ``block``; ``operations(x, vec)`` is the same with operations, for derivatives beyond the first.

    x: [N, M, C]; vec: [E, 3]; both float32.
    """
    return _Block.apply(block, operations, x, vec)
