r"""Queries and keys with Triton kernels: the products of size rows x 4 G exist for a bounded chunk of nodes only.

With c the cotangent of the gradient by h, the second derivative is that of L = <c, gradient> = <grad, J c>: a forward
pass with the tangent :math:`\dot q` = J c along :math:`\dot h` = c, which is dL by ``grad``, then one reverse pass
over value and tangent. Without a tangent the same reverse pass gives the first derivative. ``half.py`` has the passes
of frozen weights where TF32 is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.call import Change, NodeCall, apply_call
from e2former_kernels.common.checks import check_nodes
from e2former_kernels.common.registered import register
from e2former_kernels.common.sums import ChunkSums, degree_sums
from e2former_kernels.common.tiles import next_power
from e2former_kernels.linear.op import add_so3_outer, apply_so3, so3_rows
from e2former_kernels.query_key.half import HalfWeights, chunks, query_key_gradient, query_key_value
from e2former_kernels.query_key.kernels import invariants_backward_kernel, invariants_kernel
from e2former_kernels.query_key.reference import QueryKeyWeights, query_key_reference
from e2former_kernels.radial.kernels import layer_kernel, layer_reverse_kernel, row_launch

TILE_NUMBERS = 1024  # numbers of one tile of the row kernels
MAX_PROGRAMS = 256  # programs that write partial sums of weight gradients, for query and key each


class Chunk(NamedTuple):
    """What the forward pass makes for a chunk of n nodes. T = 1, or 2: value and tangent."""

    both: Tensor  # P, [T, M, n, 4 G]
    invariants: Tensor  # [2, T, n, (L+1) G]
    middle: Tensor  # products of the hidden layer, [2, T, n, G]
    hidden: Tensor  # results of the hidden layer, [2, T, n, G]


class RowWeights(NamedTuple):
    """Weights as the products take them. rows: of every row, [M, 4 G, C]."""

    given: QueryKeyWeights
    rows: Tensor


def row_weights(weights: QueryKeyWeights) -> RowWeights:
    """The weights with those of every row."""
    return RowWeights(weights, so3_rows(weights.weight))


def _invariants(kernel, both: Tensor, bias: Tensor, s: Tensor, **constants: bool) -> None:
    parts, rows, nodes, _ = both.shape
    width = bias.shape[0]
    block = min(next_power(width), 1024)
    degrees = round(rows**0.5)
    kernel[nodes, math.ceil(width / block)](
        both, bias, s, nodes, width, D=degrees, BG=block, TANGENT=parts == 2, **constants
    )


def _launch(middle: Tensor, sums: bool) -> tuple[tuple[int, int], dict, int]:
    """Grid and constants of the row kernels, and the tiles of one program."""
    groups, parts, nodes, width = middle.shape
    programs, flags = MAX_PROGRAMS if sums else None, {"NORM": True, "TANGENT": parts == 2, "EDGE_MAJOR": False}
    return row_launch(nodes, groups, width, TILE_NUMBERS, programs, **flags)


def forward_chunk(h: Tensor, h_dot: Tensor | None, row_weights: RowWeights) -> Chunk:
    """All but the last product, for the nodes of a chunk. h, h_dot: [n, M, C]."""
    nodes, rows, _ = h.shape
    weights, weight = row_weights
    given = [h] if h_dot is None else [h, h_dot]
    parts = len(given)
    both = h.new_empty(parts, rows, nodes, weight.shape[1])
    for x, products in zip(given, both, strict=True):
        apply_so3(x, weight, False, products.transpose(0, 1))
    _, width, inputs = weights.hidden_weight.shape
    s = h.new_empty(2, parts, nodes, inputs)
    _invariants(invariants_kernel, both, weights.bias, s)
    middle, hidden = (h.new_empty(2, parts, nodes, width) for _ in range(2))
    torch.bmm(s.flatten(1, 2), weights.hidden_weight.transpose(1, 2), out=middle.flatten(1, 2))
    grid, constants, _ = _launch(middle, False)
    layer_kernel[grid](middle, weights.hidden_bias, weights.norm_weight, weights.norm_bias, hidden, **constants)
    return Chunk(both, s, middle, hidden)


def _reverse_chunk(
    grad: Tensor,
    h: Tensor,
    h_dot: Tensor | None,
    chunk: Chunk,
    row_weights: RowWeights,
    by_h: Tensor,
    sums: ChunkSums | None,
) -> None:
    """Writes the gradient by h, and adds those by the weights to ``sums``. Uses up ``chunk``. grad: [2, n, O]."""
    both, s, up, hidden = chunk
    weights, weight = row_weights
    if sums is not None:
        sums.add_product("out_weight", grad.transpose(1, 2), hidden[:, -1])
    # nothing reads chunk.hidden any more: it becomes the gradient by itself, zero for a value beside its tangent
    if h_dot is not None:
        hidden[:, 0].zero_()
    torch.bmm(grad, weights.out_weight, out=hidden[:, -1])
    grid, constants, tiles = _launch(up, sums is not None)
    terms = up if sums is None else up.new_empty(grid[0], 3, *weights.hidden_bias.shape)
    layer_reverse_kernel[grid](
        hidden, up, weights.hidden_bias, weights.norm_weight, weights.norm_bias, up, terms, tiles=tiles,
        SUMS=3, WEIGHTS=sums is not None, **constants,
    )  # fmt: skip
    if sums is not None:
        sums.add_product("hidden_weight", up.flatten(1, 2).transpose(1, 2), s.flatten(1, 2))
    torch.bmm(up.flatten(1, 2), weights.hidden_weight, out=s.flatten(1, 2))
    _invariants(invariants_backward_kernel, both, weights.bias, s, WEIGHTS=sums is not None)
    apply_so3(both[0].transpose(0, 1), weight, True, by_h)
    if sums is not None:
        columns = {"rows": terms.flatten(1), "bias": both[0, 0, :, : weights.bias.shape[0]]}
        if h_dot is None:
            columns |= {"query_bias": grad[0], "key_bias": grad[1]}
        sums.add_columns(**columns)
        for x, products in zip([h] if h_dot is None else [h, h_dot], both, strict=True):
            add_so3_outer(sums, "weight", products.transpose(0, 1), x)


def gradients(
    grad: Tensor, h: Tensor, h_dot: Tensor | None, rows: RowWeights, by_weights: bool, trained: bool
) -> list[Tensor | None]:
    """Gradients of <grad, value at h>, or of <grad, tangent along h_dot>: by grad (the tangent), by h, by the weights.

    grad: [2, N, O]; h, h_dot: [N, M, C]; all contiguous; the tangent: [N, 2, O]. by_weights: whether there are any;
    None among them stands for zeros.
    """
    by_h, weights = torch.empty_like(h), rows.given
    tangent = None if h_dot is None else torch.empty_like(grad)
    sums = ChunkSums() if by_weights else None

    def of_chunk(nodes: slice) -> None:  # a function: nothing of a chunk is there when the next begins
        part_dot = None if h_dot is None else h_dot[nodes]
        chunk = forward_chunk(h[nodes], part_dot, rows)
        if tangent is not None:
            torch.bmm(chunk.hidden[:, 1], weights.out_weight.transpose(1, 2), out=tangent[:, nodes])
        _reverse_chunk(grad[:, nodes], h[nodes], part_dot, chunk, rows, by_h[nodes], sums)

    parts = 1 if h_dot is None else 2
    for chunk in chunks(h.shape[0], parts * rows.rows[..., 0].nbytes, trained):
        of_chunk(chunk.nodes)
    by_grad = None if tangent is None else tangent.transpose(0, 1)
    return [by_grad, by_h, *(() if sums is None else _of_weights(sums, weights))]


def _of_weights(sums: ChunkSums, weights: QueryKeyWeights) -> QueryKeyWeights:
    if not sums:  # no nodes
        return QueryKeyWeights(*map(torch.zeros_like, weights))
    by_norm_weight, by_norm_bias, by_hidden_bias = sums["rows"].view(3, *weights.hidden_bias.shape)
    return QueryKeyWeights(
        weight=degree_sums(sums["weight"]),
        bias=sums["bias"],
        hidden_weight=sums["hidden_weight"],
        hidden_bias=by_hidden_bias,
        norm_weight=by_norm_weight,
        norm_bias=by_norm_bias,
        out_weight=sums["out_weight"],
        out_bias=torch.stack([sums["query_bias"], sums["key_bias"]]) if "query_bias" in sums else None,
    )


def _apart(grad: Tensor) -> Tensor:
    """[N, 2, O] as [2, N, O], how it lies in memory where queries and keys went apart."""
    return grad.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class _QueryKey(NodeCall):
    trained: bool
    prepared: HalfWeights | RowWeights | None = None  # of frozen weights, kept by the caller
    # what the passes of a training step share: a weight for every row is 19 MB with the paper's width
    cache: dict = field(default_factory=dict, compare=False)

    def reference(self, h: Tensor, *weights: Tensor) -> Tensor:
        return query_key_reference(h, QueryKeyWeights(*weights))

    def _given(self, tensors: list[Tensor]) -> tuple[Tensor, HalfWeights | RowWeights]:
        """h and the weights as the products take them."""
        h, *weights = (t.contiguous() for t in tensors)
        if self.prepared is not None:
            return h, self.prepared
        rows = self.cache.get("rows") or row_weights(QueryKeyWeights(*weights))
        if self.trained:
            self.cache["rows"] = rows
        return h, rows

    def forward(self, tensors: list[Tensor]) -> Tensor:
        h, weights = self._given(tensors)
        if isinstance(weights, HalfWeights):
            return query_key_value(h, weights).transpose(0, 1)
        out = h.new_empty(2, h.shape[0], weights.given.out_weight.shape[1])
        for chunk in chunks(h.shape[0], weights.rows[..., 0].nbytes, self.trained):
            hidden, given = forward_chunk(h[chunk.nodes], None, weights).hidden[:, 0], weights.given
            last = given.out_bias.unsqueeze(1), hidden, given.out_weight.transpose(1, 2)
            torch.baddbmm(*last, out=out[:, chunk.nodes])
        return out.transpose(0, 1)  # in memory queries and keys lie apart, as the attention reads them

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        h, weights = self._given(tensors)
        if isinstance(weights, HalfWeights):
            return [query_key_gradient(_apart(grad).transpose(0, 1), h, weights)]
        _, *found = gradients(_apart(grad), h, None, weights, any(wanted), self.trained)
        return [found[n] for n in wanted]

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        if change.wanted != [0]:
            return None
        h, weights = self._given(tensors)
        if isinstance(weights, HalfWeights):
            weights = row_weights(weights.given)
        given = _apart(change.grad), h, change.cotangents[0].contiguous()
        found = gradients(*given, weights, any(n > 1 for n in by), self.trained)
        return [found[n] for n in by]


def check_query_key(h: Tensor, weights: QueryKeyWeights) -> None:
    """Raise ValueError, TypeError or RuntimeError naming what the kernels cannot take."""
    degrees, width = weights.weight.shape[0], weights.norm_weight.shape[-1]
    outputs, pair = weights.out_weight.shape[1], ("2, G", (2, width))
    check_nodes(
        "query_key", "h", h, degrees,
        weight=(weights.weight, "lmax+1, 4 G, C", (degrees, 4 * width, h.shape[-1])),
        bias=(weights.bias, "2 G", (2 * width,)),
        hidden_weight=(weights.hidden_weight, "2, G, (lmax+1) G", (2, width, degrees * width)),
        hidden_bias=(weights.hidden_bias, *pair), norm_weight=(weights.norm_weight, *pair),
        norm_bias=(weights.norm_bias, *pair), out_weight=(weights.out_weight, "2, O, G", (2, outputs, width)),
        out_bias=(weights.out_bias, "2, O", (2, outputs)),
    )  # fmt: skip


def _call(
    h: Tensor, weights: QueryKeyWeights, mode: Mode, prepared: HalfWeights | RowWeights | None = None
) -> _QueryKey:
    check_query_key(h, weights)
    if prepared is not None and mode.trained:
        raise ValueError("query_key: prepared: expected None where weights are trained")
    return _QueryKey(mode.trained, prepared)


def _shape(tensors: list[Tensor], *_) -> Tensor:
    h, out_weight = tensors[0], QueryKeyWeights(*tensors[1:]).out_weight
    return h.new_empty(2, h.shape[0], out_weight.shape[1]).transpose(0, 1)


_registered = register(
    "query_key", lambda tensors, _, __, mode: _call(tensors[0], QueryKeyWeights(*tensors[1:]), mode), _shape
)


def query_key(
    h: Tensor,
    weights: QueryKeyWeights,
    recompute_h: Callable[[], Tensor] | None = None,
    prepared: HalfWeights | RowWeights | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    """The function of :func:`query_key_reference` with Triton kernels; differentiable to any order.

    recompute_h: gives h once more, so that it is not kept (:mod:`e2former_kernels.common.call`). prepared: of weights
    that do not change and need no gradient, :func:`.half.half_weights` for value and gradient by h with float16 rows
    (``half.py``), or :func:`row_weights`; float32 and made here when None. Both have no effect where ``mode``
    is compiled, for which see :mod:`e2former_kernels.common.registered`.
    """
    if mode.compiled:
        return _registered([h, *weights], mode)
    return apply_call(_call(h, weights, mode, prepared), [h, *weights], h, recompute_h)
