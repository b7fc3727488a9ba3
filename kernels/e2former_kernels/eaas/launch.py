"""Launches of the EAAS layer's kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from e2former_kernels.common.backend import interpreting
from e2former_kernels.common.tiles import next_power
from e2former_kernels.eaas.kernel import position_kernel
from e2former_kernels.eaas.reference import EAASTables
from e2former_kernels.eaas.row_kernels import aligned_kernel, pullback_kernel, slope_kernel, sparse_kernel
from e2former_kernels.eaas.structure import frame_of, nonzeros_of

#: Numbers of a row's tile: channels of one atom or, where there are fewer channels, of several.
TILE = 256
#: Numbers that a thread of a row kernel may hold; four channels (a load of 16 bytes) where that allows.
HELD = 160
#: Rows that one thread may hold at all.
WIDEST = 100


class Form(NamedTuple):
    """How the layer is computed.

    kernel: ``dense`` makes T(r) and multiplies, ``aligned`` rotates into a frame along r and back, ``sparse`` adds up
    the nonzeros. slope, the derivative with respect to the position: ``product`` is the matrix product of path rows
    with rows, [N, P, M], times the coefficients, ``rows`` one pass over both, ``fused`` the same pass writes the
    gradient of the features too, where nothing differentiates through it.
    """

    kernel: str = "dense"
    slope: str = "product"


def row_tile(held: int, nodes: int, channels: int, tile: int) -> dict[str, int]:
    """Atoms, channels and warps of a program that holds ``held`` rows at a time."""
    block = min(next_power(channels), tile)
    atoms = min(next_power(nodes), 8) if interpreting() else tile // block
    each = 4
    while each > 1 and held * each > HELD:
        each //= 2
    return {"BN": atoms, "BC": block, "num_warps": max(atoms * block // (32 * each), 1)}


def fits(tables: EAASTables) -> bool:
    """Whether :func:`pullback`'s rows fit into registers: up to lmax 3 (at lmax 4 the compiler spills them)."""
    paths, _, rows = tables.coupling.shape
    return paths + 2 * rows <= WIDEST


def contract(
    form: Form, tables: EAASTables, position: Tensor, x: Tensor, transpose: bool, precision: str = "tf32x3"
) -> Tensor:
    """T(r) x for x: [N, M, C], or T(r)^T x for x: [N, P, C]."""
    paths, _, rows = tables.coupling.shape
    nodes, taken, channels = x.shape
    given = rows if transpose else paths
    out = x.new_empty(nodes, given, channels)
    if not out.numel():
        return out
    x, position = x.contiguous(), position.contiguous()
    if form.kernel == "dense":
        block = min(max(next_power(channels), 16), 128)
        position_kernel[nodes, triton.cdiv(channels, block)](
            tables.coupling.to(x.dtype).contiguous(), position, x, out, paths, rows, channels, TRANSPOSE=transpose,
            PP=max(next_power(paths), 16), MP=max(next_power(rows), 16), BC=block, PRECISION=precision,
            num_warps=4,
        )  # fmt: skip
        return out
    sparse = form.kernel == "sparse"
    tile = row_tile(taken if sparse else max(taken, given), nodes, channels, TILE)
    grid = triton.cdiv(nodes, tile["BN"]), triton.cdiv(channels, tile["BC"])
    if sparse:
        terms = nonzeros_of(tables)
        terms = terms.transposed if transpose else terms.forward
        sparse_kernel[grid](position, x, out, nodes, channels, TERMS=terms, ROWS=taken, OUT=given, **tile)
        return out
    frame = frame_of(tables)
    inner, outer = (frame.turn_rows, frame.swap_rows), (frame.turn_paths, frame.swap_paths)
    if transpose:
        inner, outer = outer, inner
    aligned_kernel[grid](
        position, x, out, nodes, channels, TURN_IN=inner[0], SWAP_IN=inner[1],
        PICK=frame.pick_back if transpose else frame.pick, SWAP_OUT=outer[1], TURN_OUT=outer[0], ROWS=taken, OUT=given,
        LMAX=len(tables.row_paths) - 1, **tile,
    )  # fmt: skip
    return out


def slope(tables: EAASTables, paths: Tensor, rows: Tensor) -> Tensor:
    """sum_{p,m,c} C[p,b,m] paths[n,p,c] rows[n,m,c] -> [N, 3] in one pass."""
    nodes, count, channels = paths.shape
    if not paths.numel():
        return paths.new_zeros(nodes, 3)
    out = paths.new_empty(nodes, 3)
    tile = row_tile(count + rows.shape[1], nodes, channels, TILE)
    slope_kernel[(triton.cdiv(nodes, tile["BN"]),)](
        paths.contiguous(), rows.contiguous(), out, nodes, channels, TERMS=nonzeros_of(tables).slope, PATHS=count,
        ROWS=rows.shape[1], **tile,
    )  # fmt: skip
    return out


def slope_product(tables: EAASTables, paths: Tensor, rows: Tensor) -> Tensor:
    """:func:`slope` as matrix products, by way of [N, P, M]; autograd knows its derivatives."""
    pair = torch.bmm(paths, rows.mT)
    return pair.flatten(1) @ tables.coupling.to(pair.dtype).transpose(1, 2).reshape(-1, 3)


def pullback(tables: EAASTables, position: Tensor, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of T(r) v by v and r, in one pass over the gradient's path rows."""
    nodes, count, channels = grad.shape
    if not grad.numel():
        return torch.zeros_like(value), grad.new_zeros(nodes, 3)
    out, found = value.new_empty(value.shape), grad.new_empty(nodes, 3)
    tile = row_tile(count + 2 * value.shape[1], nodes, channels, TILE)
    terms = nonzeros_of(tables)
    pullback_kernel[(triton.cdiv(nodes, tile["BN"]),)](
        position.contiguous(), grad.contiguous(), value.contiguous(), out, found, nodes, channels,
        TERMS=terms.transposed, SLOPE_TERMS=terms.slope, PATHS=count, ROWS=value.shape[1], **tile,
    )  # fmt: skip
    return out, found
