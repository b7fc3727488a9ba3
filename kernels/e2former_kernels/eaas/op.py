"""The EAAS layer in one pass over an atom's features: rotate into a frame along the position, re-index, rotate back.

The frame is made of two turns about y and a constant swap of axes, so no Wigner matrix is stored and no direction is
special. The function is bilinear: all derivatives are the same kernel, its transpose and one sum over path rows and
rows. The first derivatives by both arguments come from one pass over the path rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from e2former_kernels.common.checks import check_device, check_same, check_shape
from e2former_kernels.common.tiles import next_power
from e2former_kernels.eaas.kernels import aligned_kernel, pullback_kernel, slope_kernel
from e2former_kernels.eaas.reference import EAASConstants

#: Numbers of a row's tile: channels of one atom or, where there are fewer channels, of several.
TILE = 256
#: Numbers that a thread of a row kernel may hold; four channels (a load of 16 bytes) where that allows.
HELD = 160
#: Rows that one thread may hold at all.
WIDEST = 100


def row_tile(held: int, channels: int) -> dict[str, int]:
    """Atoms, channels and warps of a program that holds ``held`` rows at a time."""
    block = min(next_power(channels), TILE)
    atoms = TILE // block
    each = 4
    while each > 1 and held * each > HELD:
        each //= 2
    return {"BN": atoms, "BC": block, "num_warps": max(atoms * block // (32 * each), 1)}


def fits(constants: EAASConstants) -> bool:
    """Whether :func:`pullback`'s rows fit into registers: up to lmax 3 (at lmax 4 the compiler spills them)."""
    paths, _, rows = constants.coupling.shape
    return paths + 2 * rows <= WIDEST


def contract(constants: EAASConstants, position: Tensor, x: Tensor, transpose: bool) -> Tensor:
    """T(r) x for x: [N, M, C], or T(r)^T x for x: [N, P, C]."""
    paths, _, rows = constants.coupling.shape
    nodes, taken, channels = x.shape
    given = rows if transpose else paths
    out = x.new_empty(nodes, given, channels)
    if not out.numel():
        return out
    tile, lists = row_tile(max(taken, given), channels), constants.lists
    inner, outer = (lists.turn_rows, lists.swap_rows), (lists.turn_paths, lists.swap_paths)
    if transpose:
        inner, outer = outer, inner
    aligned_kernel[math.ceil(nodes / tile["BN"]), math.ceil(channels / tile["BC"])](
        position.contiguous(), x.contiguous(), out, nodes, channels, TURN_IN=inner[0], SWAP_IN=inner[1],
        PICK=lists.pick_back if transpose else lists.pick, SWAP_OUT=outer[1], TURN_OUT=outer[0], ROWS=taken, OUT=given,
        LMAX=len(constants.row_paths) - 1, **tile,
    )  # fmt: skip
    return out


def slope(constants: EAASConstants, paths: Tensor, rows: Tensor) -> Tensor:
    """sum_{p,m,c} C[p,b,m] paths[n,p,c] rows[n,m,c] -> [N, 3]."""
    nodes, count, channels = paths.shape
    if not paths.numel():
        return paths.new_zeros(nodes, 3)
    out = paths.new_empty(nodes, 3)
    tile = row_tile(count + rows.shape[1], channels)
    slope_kernel[(math.ceil(nodes / tile["BN"]),)](
        paths.contiguous(), rows.contiguous(), out, nodes, channels, TERMS=constants.lists.slope, PATHS=count,
        ROWS=rows.shape[1], **tile,
    )  # fmt: skip
    return out


def pullback(constants: EAASConstants, position: Tensor, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of T(r) v by v and r, in one pass over the gradient's path rows."""
    nodes, count, channels = grad.shape
    if not grad.numel():
        return torch.zeros_like(value), grad.new_zeros(nodes, 3)
    out, found = value.new_empty(value.shape), grad.new_empty(nodes, 3)
    tile = row_tile(count + 2 * value.shape[1], channels)
    pullback_kernel[(math.ceil(nodes / tile["BN"]),)](
        position.contiguous(), grad.contiguous(), value.contiguous(), out, found, nodes, channels,
        TERMS=constants.lists.transposed, SLOPE_TERMS=constants.lists.slope, PATHS=count, ROWS=value.shape[1], **tile,
    )  # fmt: skip
    return out, found


class _Contract(torch.autograd.Function):
    """(v, r) -> T(r) v, or T(r)^T v."""

    @staticmethod
    def forward(ctx, x: Tensor, position: Tensor, constants: EAASConstants, transpose: bool) -> Tensor:
        ctx.constants, ctx.transpose = constants, transpose
        ctx.save_for_backward(x, position)
        return contract(constants, position, x, transpose)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, position = ctx.saved_tensors
        constants, transpose = ctx.constants, ctx.transpose
        both = all(ctx.needs_input_grad[:2]) and not transpose and not torch.is_grad_enabled()
        if both and fits(constants):
            return *pullback(constants, position, grad, x), None, None
        grad_x = grad_position = None
        if ctx.needs_input_grad[0]:
            grad_x = _Contract.apply(grad, position, constants, not transpose)
        if ctx.needs_input_grad[1]:
            grad_position = _Slope.apply(*((x, grad) if transpose else (grad, x)), constants)
        return grad_x, grad_position, None, None


class _Slope(torch.autograd.Function):
    """(path rows g, rows v) -> the vector s with w . s = g . T(w) v for every w."""

    @staticmethod
    def forward(ctx, paths: Tensor, rows: Tensor, constants: EAASConstants) -> Tensor:
        ctx.constants = constants
        ctx.save_for_backward(paths, rows)
        return slope(constants, paths, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        paths, rows = ctx.saved_tensors
        grad_paths = _Contract.apply(rows, grad, ctx.constants, False) if ctx.needs_input_grad[0] else None
        grad_rows = _Contract.apply(paths, grad, ctx.constants, True) if ctx.needs_input_grad[1] else None
        return grad_paths, grad_rows, None


@torch.compiler.disable()
def axis_aligned_contraction(value: Tensor, position: Tensor, constants: EAASConstants) -> Tensor:
    """The function of :func:`axis_aligned_contraction_reference` with Triton kernels.

    value: [N, (lmax+1)^2, C]; position: [N, 3], zero and the polar axis allowed. Returns [N, P, C]. Differentiable to
    any order. Raises ValueError or RuntimeError for arguments that do not fit or a device without Triton.
    """
    check_device("axis_aligned_contraction", value.device)
    check_shape("value", value, "N, (lmax+1)^2, C", (value.shape[0], constants.coupling.shape[2], value.shape[-1]))
    check_shape("position", position, "N, 3", (value.shape[0], 3))
    check_same("value", value, False, position=position, coupling=constants.coupling)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return _Contract.apply(value.to(dtype), position.to(dtype), constants, False)
