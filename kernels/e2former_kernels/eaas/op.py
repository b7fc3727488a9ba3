"""The EAAS layer's function in one pass over an atom's features, in three ways that can be timed against each other.

``dense``: the tensor product with a node's own position is a matrix of at most a few hundred numbers, linear in the
position; a program builds it in registers and multiplies. ``aligned``: a program rotates the rows into a frame along
the position, picks and scales them, and rotates back. ``sparse``: a program adds up the matrix's nonzeros. No Wigner
matrix is stored by any, and no direction is special. The function is bilinear, so all derivatives are the same kernel,
its transpose and one sum over path rows and rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_problem
from e2former_kernels.common.checks import check_same_device, check_shape
from e2former_kernels.eaas import launch
from e2former_kernels.eaas.launch import Form
from e2former_kernels.eaas.reference import EAASTables

#: What :func:`axis_aligned_contraction` takes, by ``kernels/benchmarks/eaas_table.py``: on an H100 all forms of the
#: product take the time of a copy, the sparse one with the least rounding, and both gradients in one pass save half.
FORM = Form("sparse", "fused")


class _Contract(torch.autograd.Function):
    """(v, r) -> T(r) v, or T(r)^T v."""

    @staticmethod
    def forward(ctx, x: Tensor, position: Tensor, tables: EAASTables, transpose: bool, form: Form) -> Tensor:
        ctx.tables, ctx.transpose, ctx.form = tables, transpose, form
        ctx.save_for_backward(x, position)
        return launch.contract(form, tables, position, x, transpose)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, position = ctx.saved_tensors
        tables, transpose, form = ctx.tables, ctx.transpose, ctx.form
        both = all(ctx.needs_input_grad[:2]) and not transpose and not torch.is_grad_enabled()
        if both and form.slope == "fused" and launch.fits(tables):
            return *launch.pullback(tables, position, grad, x), None, None, None
        grad_x = grad_position = None
        if ctx.needs_input_grad[0]:
            grad_x = _Contract.apply(grad, position, tables, not transpose, form)
        if ctx.needs_input_grad[1]:
            pair = (x, grad) if transpose else (grad, x)
            known = form.slope == "product"
            grad_position = launch.slope_product(tables, *pair) if known else _Slope.apply(*pair, tables, form)
        return grad_x, grad_position, None, None, None


class _Slope(torch.autograd.Function):
    """(path rows g, rows v) -> the vector s with w . s = g . T(w) v for every w."""

    @staticmethod
    def forward(ctx, paths: Tensor, rows: Tensor, tables: EAASTables, form: Form) -> Tensor:
        ctx.tables, ctx.form = tables, form
        ctx.save_for_backward(paths, rows)
        return launch.slope(tables, paths, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        paths, rows = ctx.saved_tensors
        grad_paths = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_paths = _Contract.apply(rows, grad, ctx.tables, False, ctx.form)
        if ctx.needs_input_grad[1]:
            grad_rows = _Contract.apply(paths, grad, ctx.tables, True, ctx.form)
        return grad_paths, grad_rows, None, None


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
    return _Contract.apply(value.to(dtype), position.to(dtype), tables, False, FORM)
