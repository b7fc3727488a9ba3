"""The EAAS layer's function in one pass over an atom's features.

The tensor product with a node's own position is a matrix of at most a few hundred numbers that depends linearly on the
position. A program builds it in registers from the coefficients and multiplies: no Wigner matrix is needed, none is
stored, and no direction is special. The function is bilinear, so all derivatives are the same kernel, its transpose and
one small product.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from e2former_kernels.common.backend import triton_problem
from e2former_kernels.common.checks import check_same_device, check_shape
from e2former_kernels.common.radial_kernel import dot_precision
from e2former_kernels.common.tiles import next_power
from e2former_kernels.eaas.kernel import position_kernel
from e2former_kernels.eaas.reference import EAASTables


def _launch(coupling: Tensor, position: Tensor, x: Tensor, transpose: bool) -> Tensor:
    paths, _, rows = coupling.shape
    nodes, _, channels = x.shape
    out = x.new_empty(nodes, rows if transpose else paths, channels)
    if out.numel():
        block = min(max(next_power(channels), 16), 128)
        position_kernel[nodes, triton.cdiv(channels, block)](
            coupling, position.contiguous(), x.contiguous(), out, paths, rows, channels, TRANSPOSE=transpose,
            PP=max(next_power(paths), 16), MP=max(next_power(rows), 16), BC=block, PRECISION=dot_precision(x.dtype),
            num_warps=4,
        )  # fmt: skip
    return out


def _bilinear(paths: Tensor, rows: Tensor, coupling: Tensor) -> Tensor:
    """sum_{p,m,c} C[p,b,m] paths[n,p,c] rows[n,m,c] -> [N, 3]."""
    pair = torch.bmm(paths, rows.mT)
    return pair.flatten(1) @ coupling.transpose(1, 2).reshape(-1, 3)


class _Contract(torch.autograd.Function):
    """(v, r) -> T(r) v, or T(r)^T v."""

    @staticmethod
    def forward(ctx, x: Tensor, position: Tensor, coupling: Tensor, transpose: bool) -> Tensor:
        ctx.transpose = transpose
        ctx.save_for_backward(x, position, coupling)
        return _launch(coupling, position, x, transpose)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, position, coupling = ctx.saved_tensors
        grad_x = grad_position = None
        if ctx.needs_input_grad[0]:
            grad_x = _Contract.apply(grad, position, coupling, not ctx.transpose)
        if ctx.needs_input_grad[1]:
            pair = (x, grad) if ctx.transpose else (grad, x)
            grad_position = _bilinear(*pair, coupling)
        return grad_x, grad_position, None, None


@torch.compiler.disable()
def axis_aligned_contraction(value: Tensor, position: Tensor, tables: EAASTables) -> Tensor:
    """The function of :func:`axis_aligned_contraction_reference` with a Triton kernel.

    value: [N, (lmax+1)^2, C]; position: [N, 3], zero and the polar axis allowed. Returns [N, P, C]. Differentiable to
    any order. Raises ValueError or RuntimeError for arguments that do not fit or a device without Triton.
    """
    problem = triton_problem(value.device)
    if problem is not None:
        raise RuntimeError(f"axis_aligned_contraction: {problem}; use axis_aligned_contraction_reference")
    check_shape("value", value, "N, (lmax+1)^2, C", (value.shape[0], tables.coupling.shape[2], value.shape[-1]))
    check_shape("position", position, "N, 3", (value.shape[0], 3))
    check_same_device("value", value, position=position, coupling=tables.coupling)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    coupling = tables.coupling.to(dtype).contiguous()
    return _Contract.apply(value.to(dtype), position.to(dtype), coupling, False)
