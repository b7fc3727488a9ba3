r"""The multilinear pieces of an attention step as registered operations, differentiable to any order.

:math:`F = \sum_e \sum_{b,r,h} w_{eh} s_{eb} v_{j(e) r h} g_{i(e) b r h}` (``kernel.py``) has four partial derivatives,
each of them linear in three arguments, and the derivatives of those are again partial derivatives of F. The pair form
:math:`\sum_e \sum_{h,s} a_{eh} q_{i(e) h s} k_{j(e) h s}` likewise. Nothing here holds more than [E, B, H] numbers per
edge, and the caller passes edges in runs of bounded length.

Index arguments, as in :class:`e2former_kernels.common.plan.EdgeChunk`: source [E], target [E] (ascending), row_ptr
[N+1], order [E] and order_ptr [senders+1].
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from e2former_kernels.common.half import Rows, half_rows, new_rows
from e2former_kernels.common.tiles import next_power, row_tiles
from e2former_kernels.equivariant_attention import kernel

PAIR_TILE = (32, 1)  # heads and warps of one program of pair_sum_kernel


def _op(name: str):
    return torch.library.custom_op(f"e2former_kernels::{name}", mutates_args=())


def launch_aggregate(
    weight: Tensor, scale: Tensor, value: Tensor, source: Tensor, row_ptr: Tensor, out: Tensor
) -> None:
    """out[N, B, R, H] = dF/dg. weight: [E, H], scale: [E, B], value: [senders, R, H], contiguous."""
    nodes, directions, rows, heads = out.shape
    if not out.numel():
        return
    tiles = row_tiles(rows, heads, directions)
    kernel.aggregate_kernel[nodes, triton.cdiv(heads, tiles.heads)](
        weight, scale, value, source, row_ptr, out, rows, heads,
        B=directions, RA=tiles.rows_a, RB=tiles.rows_b, BH=tiles.heads, num_warps=tiles.warps,
    )  # fmt: skip


def launch_aggregate_transposed(
    weight: Tensor,
    scale: Tensor,
    grad: Tensor,
    target: Tensor,
    order: Tensor,
    order_ptr: Tensor,
    out: Tensor,
    senders: Tensor | None = None,
) -> None:
    """dF/dv written to out[senders, R, H], or added to the rows ``senders`` of it."""
    directions, rows, heads = grad.shape[1:]
    number = order_ptr.numel() - 1
    if not (number and rows * heads):
        return
    tiles = row_tiles(rows, heads, 2)
    kernel.aggregate_transposed_kernel[number, triton.cdiv(heads, tiles.heads)](
        weight, scale, grad, target, order, order_ptr, order if senders is None else senders, out, rows, heads,
        B=directions, RA=tiles.rows_a, RB=tiles.rows_b, BH=tiles.heads, ACCUMULATE=senders is not None,
        num_warps=tiles.warps,
    )  # fmt: skip


def launch_message_dot(value: Tensor, grad: Tensor, source: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """out[E, B, H] = sum over rows of value times grad, grad [N, B, R, H]."""
    nodes, directions, rows, heads = grad.shape
    if not out.numel():
        return
    tiles = row_tiles(rows, heads, directions, widest=64, registers=108)
    kernel.message_dot_kernel[nodes, triton.cdiv(heads, tiles.heads)](
        value, grad, source, row_ptr, out, rows, heads,
        B=directions, RA=tiles.rows_a, RB=tiles.rows_b, BH=tiles.heads, num_warps=tiles.warps,
    )  # fmt: skip


def launch_pair_dot(query: Tensor, key: Tensor, source: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """out[E, H] = <q, k> of every edge and head."""
    nodes, heads, width = query.shape
    if not out.numel():
        return
    block = min(next_power(heads), 128)
    kernel.pair_dot_kernel[nodes, triton.cdiv(heads, block)](
        query, key, source, row_ptr, out, heads, width, BH=block, BS=next_power(width), num_warps=2
    )


def launch_pair_sum(
    weight: Tensor,
    x: Tensor,
    index: Tensor,
    order: Tensor | None,
    ptr: Tensor,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """out[n, H, S] = sum over the edges of n of weight [E, H] times x[index], or added to the rows ``rows`` of it."""
    heads, width = x.shape[1:]
    number = ptr.numel() - 1
    if not (number and heads * width):
        return
    block = min(next_power(heads), PAIR_TILE[0])
    kernel.pair_sum_kernel[number, triton.cdiv(heads, block)](
        weight, x, index, index if order is None else order, ptr, index if rows is None else rows, out, heads, width,
        BH=block, BS=next_power(width), ORDERED=order is not None, ACCUMULATE=rows is not None, num_warps=PAIR_TILE[1],
    )  # fmt: skip


def launch_contract(matrix: Tensor, x: Tensor, out: Tensor, precision: str) -> None:
    """out[n, P, C] = matrix [P, K] times x[n, K, C], all contiguous; x and out may be float16.

    precision: ``input_precision`` of ``tl.dot``.
    """
    nodes, inner, channels = x.shape
    if not out.numel():
        return
    block = min(max(next_power(channels), 16), 128)
    kernel.contract_kernel[nodes, triton.cdiv(channels, block)](
        matrix, x, out, matrix.shape[0], inner, channels,
        PP=max(next_power(matrix.shape[0]), 16), KP=max(next_power(inner), 16), BC=block,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip


LARGEST_CONTRACTION = 1 << 15  # numbers that one program holds, 128 a thread


def contract_rows(matrix: Tensor, x: Tensor, precision: str) -> Rows:
    """:func:`launch_contract` to float16 rows [n, P, C] with factors [n]; matrix and x are float32."""
    nodes, inner, channels = x.shape
    paths = matrix.shape[0]
    block, padded = max(next_power(channels), 16), max(next_power(paths), 16)
    if block * padded > LARGEST_CONTRACTION:
        out = x.new_empty(nodes, paths, channels)
        launch_contract(matrix, x, out, precision)
        return half_rows(out)
    rows = new_rows(x, nodes, paths, channels)
    if rows.numbers.numel():
        kernel.contract_rows_kernel[(nodes,)](
            matrix, x, *rows, paths, inner, channels, PP=padded, KP=max(next_power(inner), 16), BC=block,
            PRECISION=precision, num_warps=8 if block * padded > 4096 else 4,
        )  # fmt: skip
    return rows


# --- F and its four derivatives -----------------------------------------------------------------------------------


@_op("aggregate")
def aggregate(
    weight: Tensor,
    scale: Tensor,
    value: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """dF/dg. weight: [E, H]; scale: [E, B]; value: [senders, R, H]. Returns [N, B, R, H]."""
    out = value.new_empty(row_ptr.numel() - 1, scale.shape[1], *value.shape[1:])
    launch_aggregate(weight.contiguous(), scale.contiguous(), value.contiguous(), source, row_ptr, out)
    return out


@_op("aggregate_transposed")
def aggregate_transposed(
    weight: Tensor,
    scale: Tensor,
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """dF/dv. weight: [E, H]; scale: [E, B]; grad: [N, B, R, H]. Returns [senders, R, H]."""
    out = grad.new_empty(order_ptr.numel() - 1, *grad.shape[2:])
    launch_aggregate_transposed(
        weight.contiguous(), scale.contiguous(), grad.contiguous(), target, order, order_ptr, out
    )
    return out


@_op("message_weight")
def message_weight(
    scale: Tensor,
    value: Tensor,
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """dF/dw. scale: [E, B]; value: [senders, R, H]; grad: [N, B, R, H]. Returns [E, H]."""
    dots = value.new_empty(source.numel(), grad.shape[1], grad.shape[3])
    launch_message_dot(value.contiguous(), grad.contiguous(), source, row_ptr, dots)
    return (dots * scale.unsqueeze(-1)).sum(1)


@_op("message_scale")
def message_scale(
    weight: Tensor,
    value: Tensor,
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """dF/ds. weight: [E, H]; value: [senders, R, H]; grad: [N, B, R, H]. Returns [E, B]."""
    dots = value.new_empty(source.numel(), grad.shape[1], grad.shape[3])
    launch_message_dot(value.contiguous(), grad.contiguous(), source, row_ptr, dots)
    return (dots * weight.unsqueeze(1)).sum(2)


@aggregate.register_fake
def _(weight, scale, value, source, target, row_ptr, order, order_ptr):
    return value.new_empty(row_ptr.shape[0] - 1, scale.shape[1], value.shape[1], value.shape[2])


@aggregate_transposed.register_fake
def _(weight, scale, grad, source, target, row_ptr, order, order_ptr):
    return grad.new_empty(order_ptr.shape[0] - 1, grad.shape[2], grad.shape[3])


@message_weight.register_fake
def _(scale, value, grad, source, target, row_ptr, order, order_ptr):
    return scale.new_empty(source.shape[0], value.shape[2])


@message_scale.register_fake
def _(weight, value, grad, source, target, row_ptr, order, order_ptr):
    return weight.new_empty(source.shape[0], grad.shape[1])


_PARTIALS = {"g": aggregate, "v": aggregate_transposed, "w": message_weight, "s": message_scale}


def _register_partial(result: str) -> None:
    names = [n for n in "wsvg" if n != result]

    def backward(ctx, cotangent: Tensor):
        tensors, index = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        known = dict(zip(names, tensors, strict=True)) | {result: cotangent}
        grads = [
            _PARTIALS[name](*(known[n] for n in "wsvg" if n != name), *index) if ctx.needs_input_grad[k] else None
            for k, name in enumerate(names)
        ]
        return (*grads, None, None, None, None, None)

    def setup(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    _PARTIALS[result].register_autograd(backward, setup_context=setup)


for _name in _PARTIALS:
    _register_partial(_name)


# --- the pair form and its three derivatives ----------------------------------------------------------------------


@_op("pair_dot")
def pair_dot(
    query: Tensor,
    key: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """<q_i, k_j> of every edge and head. query: [N, H, S]; key: [senders, H, S]. Returns [E, H]."""
    out = query.new_empty(source.numel(), query.shape[1])
    launch_pair_dot(query.contiguous(), key.contiguous(), source, row_ptr, out)
    return out


@_op("pair_to_target")
def pair_to_target(
    weight: Tensor,
    key: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """sum_j a_ij k_j. weight: [E, H]; key: [senders, H, S]. Returns [N, H, S]."""
    out = key.new_empty(row_ptr.numel() - 1, *key.shape[1:])
    launch_pair_sum(weight.contiguous(), key.contiguous(), source, None, row_ptr, out)
    return out


@_op("pair_to_source")
def pair_to_source(
    weight: Tensor,
    query: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    order: Tensor,
    order_ptr: Tensor,
) -> Tensor:
    """sum_i a_ij q_i. weight: [E, H]; query: [N, H, S]. Returns [senders, H, S]."""
    out = query.new_empty(order_ptr.numel() - 1, *query.shape[1:])
    launch_pair_sum(weight.contiguous(), query.contiguous(), target, order, order_ptr, out)
    return out


@pair_dot.register_fake
def _(query, key, source, target, row_ptr, order, order_ptr):
    return query.new_empty(source.shape[0], query.shape[1])


@pair_to_target.register_fake
def _(weight, key, source, target, row_ptr, order, order_ptr):
    return key.new_empty(row_ptr.shape[0] - 1, key.shape[1], key.shape[2])


@pair_to_source.register_fake
def _(weight, query, source, target, row_ptr, order, order_ptr):
    return query.new_empty(order_ptr.shape[0] - 1, query.shape[1], query.shape[2])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _pair_dot_backward(ctx, grad: Tensor):
    query, key, *index = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        pair_to_target(grad, key, *index) if need[0] else None,
        pair_to_source(grad, query, *index) if need[1] else None,
        *[None] * 5,
    )


def _pair_to_target_backward(ctx, grad: Tensor):
    weight, key, *index = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        pair_dot(grad, key, *index) if need[0] else None,
        pair_to_source(weight, grad, *index) if need[1] else None,
        *[None] * 5,
    )


def _pair_to_source_backward(ctx, grad: Tensor):
    weight, query, *index = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        pair_dot(query, grad, *index) if need[0] else None,
        pair_to_target(weight, grad, *index) if need[1] else None,
        *[None] * 5,
    )


pair_dot.register_autograd(_pair_dot_backward, setup_context=_save)
pair_to_target.register_autograd(_pair_to_target_backward, setup_context=_save)
pair_to_source.register_autograd(_pair_to_source_backward, setup_context=_save)
