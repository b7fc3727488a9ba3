r"""The gated feed-forward network and its gradient by x with float16 products: frozen weights where TF32 is allowed.

Rows go from kernel to product as float16 with a factor per node (``common/half.py``). Only the gates read row 0 of the
first linear map, so with frozen weights both maps are one: :math:`G = (W_g W_0) h_0 + W_g b_1 + b_g`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.backend import float32_products
from e2former_kernels.common.chunks import node_chunks
from e2former_kernels.common.half import Rows, from_products, half_rows, half_weight, new_rows, row_bias
from e2former_kernels.common.tiles import next_power
from e2former_kernels.feedforward import kernels as kernel
from e2former_kernels.feedforward.kernels import launch_power, launch_power_backward
from e2former_kernels.feedforward.reference import SIGMOID_SCALE, SILU_SCALE, Weights
from e2former_kernels.layer_norm.op import launch_norm_rows, launch_norm_rows_reverse
from e2former_kernels.linear.op import apply_so3, so3_rows


class HalfWeights(NamedTuple):
    """Weights as the products take them: of rows, with factors of degrees.

    weight1: [M-1, C, C], of the rows behind row 0; gates: [1, (L+1) C, C]; weight2: [M, C, C].
    """

    given: Weights
    weight1: Rows
    gates: Rows
    gate_bias: Tensor  # [(L+1) C]
    weight2: Rows
    back: Tensor  # [M], factors of the rows of the gradient by h
    last: Tensor  # [M], those of the result
    last_bias: Tensor  # [M, C], zero but for row 0


def half_weights(weights: Weights, precision: str) -> HalfWeights:
    """What the products take, made of weights that do not change. precision: of products outside."""
    with float32_products(precision):
        both = (weights.gate_weight @ weights.weight1[0]).unsqueeze(0)
        gate_bias = torch.addmv(weights.gate_bias, weights.gate_weight, weights.bias1)
    gates, gate_factor = half_weight(both)
    weight1, degrees1 = half_weight(weights.weight1)
    weight2, degrees2 = half_weight(weights.weight2)
    back = torch.cat([gate_factor, so3_rows(degrees1)[1:]])
    rows = so3_rows(weight1)[1:]
    return HalfWeights(
        weights,
        Rows(rows, degrees1),
        Rows(gates, gate_factor),
        gate_bias,
        Rows(so3_rows(weight2), degrees2),
        back,
        so3_rows(degrees2),
        row_bias(weights.bias2, back.shape[0]),
    )


def _launch(x: Tensor) -> dict:
    """Constants of the gate kernels, whose programs have all channels of a node. x: [n, M, C]."""
    _, rows, channels = x.shape
    block = next_power(channels)
    warps = min(max(block // 256, 1), 8)
    return {"SILU": SILU_SCALE, "SIGMOID": SIGMOID_SCALE, "D": round(rows**0.5), "BC": block, "num_warps": warps}


def _normal(x: Tensor, given: Weights) -> Rows:
    """The normalised rows, with the power spectrum's share in row 0."""
    h = Rows(*launch_norm_rows(x, given.norm_weight, given.norm_bias))
    if given.power_weight is not None:
        h.numbers[:, 0] += launch_power(h) @ given.power_weight.t() / h.factor.unsqueeze(1)
    return h


def _first(rows: Rows, weights: HalfWeights) -> tuple[Rows, Tensor]:
    """Products of the rows behind row 0, [n, M-1, C], with the nodes' factors, and those of the gates, [n, (L+1) C]."""
    h, factor = rows
    y = h.new_empty(h.shape[0], h.shape[1] - 1, h.shape[2])
    torch.bmm(h[:, 1:].transpose(0, 1), weights.weight1.numbers.transpose(1, 2), out=y.transpose(0, 1))
    return Rows(y, factor), h[:, 0] @ weights.gates.numbers[0].t()


def _gate_arguments(y: Rows, gates: Tensor, weights: HalfWeights) -> tuple[Tensor, ...]:
    return y.numbers, gates, y.factor, weights.weight1.factor, weights.gates.factor, weights.gate_bias


def half_value(x: Tensor, half: HalfWeights, residual: bool) -> Tensor:
    """The network on x [N, M, C], contiguous; plus x itself with ``residual``."""
    out = torch.empty_like(x)
    for chunk in node_chunks(x.shape[0]) if x.numel() else ():
        part = x[chunk.nodes]
        y, gates = _first(_normal(part, half.given), half)
        z = new_rows(part, *part.shape)
        kernel.half_gate_kernel[(part.shape[0],)](*_gate_arguments(y, gates, half), *z, part.shape[2], **_launch(part))
        products = apply_so3(z.numbers, half.weight2.numbers, False, torch.empty_like(z.numbers))
        from_products(products, z.factor, half.last, out[chunk.nodes], half.last_bias, part if residual else None)
    return out


def half_gradient(grad: Tensor, x: Tensor, half: HalfWeights, residual: bool) -> Tensor:
    """Gradient by x of <grad, result>. grad, x: [N, M, C], contiguous."""
    by_x = torch.empty_like(x)
    for chunk in node_chunks(x.shape[0]) if x.numel() else ():
        part, by_out = x[chunk.nodes], grad[chunk.nodes]
        normal = _normal(part, half.given)
        y, gates = _first(normal, half)
        rows, factor = half_rows(by_out)
        by_z = apply_so3(rows, half.weight2.numbers, True, torch.empty_like(rows))
        common = torch.empty_like(factor)
        kernel.half_gate_backward_kernel[(part.shape[0],)](
            by_z, factor, half.weight2.factor, *_gate_arguments(y, gates, half), common, part.shape[2], **_launch(part)
        )
        by_h = rows  # nothing reads it any more
        torch.mm(gates, half.gates.numbers[0], out=by_h[:, 0])
        torch.bmm(y.numbers.transpose(0, 1), half.weight1.numbers, out=by_h[:, 1:].transpose(0, 1))
        if half.given.power_weight is not None:
            of_scalars = (common * half.back[0]).unsqueeze(1)
            by_power = (by_h[:, 0] * of_scalars) @ half.given.power_weight
            launch_power_backward(normal, by_power, Rows(by_h, common), half.back)
        launch_norm_rows_reverse(
            part, half.given.norm_weight, Rows(by_h, common), half.back, by_out if residual else None, by_x[chunk.nodes]
        )
    return by_x
