r"""Queries and keys, their gradients and second derivatives without a graph, on runs of nodes.

With c the cotangent of the gradient by h, the second derivative is that of L = <c, gradient> = <grad, J c>: a forward
pass with the tangent :math:`\dot q` = J c along :math:`\dot h` = c, which is dL by ``grad``, then one reverse pass
over value and tangent. Without a tangent the same reverse pass gives the first derivative. Products of size rows x 4 G
(one of the value, one of the tangent) exist for a bounded run of nodes only. ``half.py`` has the passes of frozen
weights where TF32 is allowed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from e2former_kernels.common.degree_sums import degree_sums
from e2former_kernels.common.grouped_linear import add_so3_outer, apply_so3, so3_rows
from e2former_kernels.common.radial_second_kernel import second_pair_backward_kernel, second_pair_kernel
from e2former_kernels.common.run_sums import RunSums
from e2former_kernels.common.step import NodeRun, node_runs
from e2former_kernels.common.tiles import next_power
from e2former_kernels.query_key.kernel import invariants_backward_kernel, invariants_kernel
from e2former_kernels.query_key.reference import LAYER_NORM_EPS, QueryKeyWeights

# Working memory of a run of nodes, in bytes: half of the nodes' within these limits. More runs cost launches, and where
# a few of them take all the memory that the rest of a layer leaves, fewer are no faster.
LEAST_BYTES = 1 << 27
MOST_BYTES = 1 << 29
TRAINING_BYTES = 1 << 30  # of a run in training, whose second derivatives keep more beside
TILE_NUMBERS = 1024  # numbers of one tile of the row kernels
MAX_PROGRAMS = 256  # programs that write partial sums of weight gradients, for query and key each


class Run(NamedTuple):
    """What the forward pass makes for a run of n nodes. T = 1, or 2: value and tangent."""

    both: Tensor  # P, [T, M, n, 4 G]
    invariants: Tensor  # [2, T, n, (L+1) G]
    middle: Tensor  # products of the hidden layer, [2, T, n, G]
    hidden: Tensor  # results of the hidden layer, [2, T, n, G]


class RowWeights(NamedTuple):
    """Weights as the products take them. rows: of every row, [M, 4 G, C]."""

    given: QueryKeyWeights
    rows: Tensor


class Gradients(NamedTuple):
    """Gradients of <grad, value>, or of <grad, tangent> where there is one."""

    by_h: Tensor
    by_weights: QueryKeyWeights | None  # None in it: zeros
    tangent: Tensor | None  # [2, N, O]


def runs(h: Tensor, row_weights: RowWeights, parts: int, trained: bool) -> list[NodeRun]:
    """Runs of nodes with products of bounded size. parts: T. trained: longer ones."""
    rows = row_weights.rows
    node = parts * h.shape[1] * rows.shape[1] * rows.element_size()
    budget = min(max(h.shape[0] * node // 2, LEAST_BYTES), MOST_BYTES)
    if trained:
        budget = TRAINING_BYTES
    return node_runs(h.shape[0], max(-(-budget // node), 16)) if h.numel() else []


def row_weights(weights: QueryKeyWeights) -> RowWeights:
    """The weights with those of every row."""
    return RowWeights(weights, so3_rows(weights.weight))


def outputs(hidden: Tensor, row_weights: RowWeights, out: Tensor) -> None:
    """The last linear layer. hidden: [2, n, G]; out: [2, n, O], any strides."""
    given = row_weights.given
    torch.baddbmm(given.out_bias.unsqueeze(1), hidden, given.out_weight.transpose(1, 2), out=out)


def _invariants(kernel, both: Tensor, bias: Tensor, s: Tensor, **constants: bool) -> None:
    parts, rows, nodes, _ = both.shape
    width = bias.shape[0]
    block = min(next_power(width), 1024)
    degrees = round(rows**0.5)
    kernel[nodes, triton.cdiv(width, block)](
        both, bias, s, nodes, width, D=degrees, BG=block, TANGENT=parts == 2, **constants
    )


def _launch(middle: Tensor, sums: bool) -> tuple[tuple[int, int], dict, int]:
    """Grid and constants of the row kernels, and the tiles of one program."""
    groups, parts, nodes, width = middle.shape
    padded = next_power(width)
    block = max(TILE_NUMBERS // padded, 1)
    steps = triton.cdiv(triton.cdiv(nodes, block), MAX_PROGRAMS) if sums else 1
    constants = {
        "E": nodes, "G": groups, "H": width, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": block, "NORM": True,
        "EDGE_MAJOR": False, "TANGENT": parts == 2, "num_warps": 4,
    }  # fmt: skip
    return (triton.cdiv(nodes, block * steps), groups), constants, steps


def forward_run(h: Tensor, h_dot: Tensor | None, row_weights: RowWeights) -> Run:
    """All but the last product, for the nodes of a run. h, h_dot: [n, M, C]."""
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
    second_pair_kernel[grid](
        middle, weights.hidden_bias, weights.norm_weight, weights.norm_bias, hidden, **constants
    )  # fmt: skip
    return Run(both, s, middle, hidden)


def _reverse_run(
    grad: Tensor,
    h: Tensor,
    h_dot: Tensor | None,
    run: Run,
    row_weights: RowWeights,
    by_h: Tensor,
    sums: RunSums | None,
) -> None:
    """Writes the gradient by h, and adds those by the weights to ``sums``. Uses up ``run``. grad: [2, n, O]."""
    both, s, up, hidden = run
    weights, weight = row_weights
    if sums is not None:
        sums.add_product("out_weight", grad.transpose(1, 2), hidden[:, -1])
    # nothing reads run.hidden any more: it becomes the gradient by itself, which is zero for a value beside its tangent
    if h_dot is not None:
        hidden[:, 0].zero_()
    torch.bmm(grad, weights.out_weight, out=hidden[:, -1])
    grid, constants, steps = _launch(up, sums is not None)
    terms = up if sums is None else up.new_empty(grid[0], 3, *weights.hidden_bias.shape)
    second_pair_backward_kernel[grid](
        hidden, up, weights.hidden_bias, weights.norm_weight, weights.norm_bias, up, terms, steps=steps,
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
) -> Gradients:
    """Gradients of <grad, value at h>, or of <grad, tangent along h_dot>, by h and, where asked for, the weights.

    grad: [2, N, O]; h, h_dot: [N, M, C]; all contiguous.
    """
    by_h, weights = torch.empty_like(h), rows.given
    tangent = None if h_dot is None else torch.empty_like(grad)
    sums = RunSums() if by_weights else None

    def of_run(nodes: slice) -> None:  # a function: nothing of a run is there when the next begins
        part_dot = None if h_dot is None else h_dot[nodes]
        run = forward_run(h[nodes], part_dot, rows)
        if tangent is not None:
            torch.bmm(run.hidden[:, 1], weights.out_weight.transpose(1, 2), out=tangent[:, nodes])
        _reverse_run(grad[:, nodes], h[nodes], part_dot, run, rows, by_h[nodes], sums)

    for nodes, *_ in runs(h, rows, 1 if h_dot is None else 2, trained):
        of_run(nodes)
    return Gradients(by_h, None if sums is None else _of_weights(sums, weights), tangent)


def _of_weights(sums: RunSums, weights: QueryKeyWeights) -> QueryKeyWeights:
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
