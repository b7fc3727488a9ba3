"""The three partial derivatives of the edge-degree form as registered operations, differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.common.tiles import ceil_div, next_power
from e2former_kernels.edge_degree import kernel


def _op(name: str):
    return torch.library.custom_op(f"e2former_kernels::{name}", mutates_args=())


def _warps(numbers: int) -> int:
    return 4 if numbers >= 2048 else 2


def launch_harmonic_features(harmonics: Tensor, grad: Tensor, row_ptr: Tensor, out: Tensor) -> None:
    """out[E, L, K] = :func:`harmonic_features` of contiguous tensors."""
    (_, degrees, width), (nodes, rows, _) = out.shape, grad.shape
    if out.numel():
        block = min(next_power(width), 128)
        kernel.harmonic_features_kernel[nodes, ceil_div(width, block)](
            harmonics, grad, row_ptr, out, rows, degrees, width, BL=degrees, BK=block, num_warps=1
        )


@_op("harmonic_sum")
def harmonic_sum(harmonics: Tensor, features: Tensor, row_ptr: Tensor) -> Tensor:
    """sum_e Y_em a_e,l(m),c. harmonics: [E, M]; features: [E, L, K]; row_ptr: [N+1]. Returns [N, M, K]."""
    (_, rows), (_, degrees, width) = harmonics.shape, features.shape
    nodes = row_ptr.numel() - 1
    out = features.new_empty(nodes, rows, width)
    if out.numel():
        block = min(next_power(width), 128)
        kernel.harmonic_sum_kernel[nodes, ceil_div(width, block)](
            harmonics.contiguous(), features.contiguous(), row_ptr, out, rows, degrees, width,
            BM=next_power(rows), BK=block, num_warps=_warps(next_power(rows) * block),
        )  # fmt: skip
    return out


@_op("harmonic_features")
def harmonic_features(harmonics: Tensor, grad: Tensor, row_ptr: Tensor, degrees: int) -> Tensor:
    """sum over m of degree l of Y_em g_imc. harmonics: [E, M]; grad: [N, M, K]. Returns [E, L, K]."""
    out = grad.new_empty(harmonics.shape[0], degrees, grad.shape[2])
    launch_harmonic_features(harmonics.contiguous(), grad.contiguous(), row_ptr, out)
    return out


@_op("harmonic_dot")
def harmonic_dot(features: Tensor, grad: Tensor, row_ptr: Tensor) -> Tensor:
    """<a_e,l(m), g_im>. features: [E, L, K]; grad: [N, M, K]. Returns [E, M]."""
    (edges, degrees, width), (nodes, rows, _) = features.shape, grad.shape
    out = grad.new_empty(edges, rows)
    if out.numel():
        kernel.harmonic_dot_kernel[(nodes,)](
            features.contiguous(), grad.contiguous(), row_ptr, out, rows, degrees, width,
            BM=next_power(rows), BK=next_power(width), num_warps=_warps(next_power(rows) * next_power(width)),
        )  # fmt: skip
    return out


@harmonic_sum.register_fake
def _(harmonics, features, row_ptr):
    return features.new_empty(row_ptr.shape[0] - 1, harmonics.shape[1], features.shape[2])


@harmonic_features.register_fake
def _(harmonics, grad, row_ptr, degrees):
    return grad.new_empty(harmonics.shape[0], degrees, grad.shape[2])


@harmonic_dot.register_fake
def _(features, grad, row_ptr):
    return grad.new_empty(features.shape[0], grad.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    if len(inputs) == 4:
        ctx.degrees = inputs[3]


def _sum_backward(ctx, grad: Tensor):
    harmonics, features, row_ptr = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        harmonic_dot(features, grad, row_ptr) if need[0] else None,
        harmonic_features(harmonics, grad, row_ptr, features.shape[1]) if need[1] else None,
        None,
    )


def _features_backward(ctx, grad: Tensor):
    harmonics, node_grad, row_ptr = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        harmonic_dot(grad, node_grad, row_ptr) if need[0] else None,
        harmonic_sum(harmonics, grad, row_ptr) if need[1] else None,
        None,
        None,
    )


def _dot_backward(ctx, grad: Tensor):
    features, node_grad, row_ptr = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        harmonic_features(grad, node_grad, row_ptr, features.shape[1]) if need[0] else None,
        harmonic_sum(grad, features, row_ptr) if need[1] else None,
        None,
    )


harmonic_sum.register_autograd(_sum_backward, setup_context=_save)
harmonic_features.register_autograd(_features_backward, setup_context=_save)
harmonic_dot.register_autograd(_dot_backward, setup_context=_save)
