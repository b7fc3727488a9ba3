r"""Equivariant axis-aligned sparsification (EAAS) in plain PyTorch.

The tensor product of an atom's features with its own position, T(r) v, is dense in the lab frame. In a frame whose
polar axis points along r only one component of r is left, and with it one coefficient for each output row: the
product becomes a re-indexing (arXiv:2601.16622). So: rotate v, pick and scale rows, rotate back.

The result is bilinear in v and r and therefore smooth; the frame is not. It is undefined at r = 0, and any choice of
it turns somewhere. Differentiating through the frame gives wrong forces there, so nothing is: the derivatives are
written down from the bilinear map. The one with respect to v is the same re-indexing transposed, the one with
respect to r is the contraction with the coefficients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Smaller coefficients are rounding.
SMALLEST = 1e-5


class Lists(NamedTuple):
    """Constants of the kernels, each one flat tuple (:func:`flat`).

    transposed: M lists of (b, p, coefficient), the nonzeros of C[p, b, m]. slope: 3 P lists, at 3 p + b, of
    (m, coefficient). The others make the axis-aligned frame: turn about y, swap of x and y, turn, pick, and back.
    turn_rows, turn_paths: by row m three numbers, the row -m it mixes with, |m|, and 1 where its sine has a plus.
    swap_rows, swap_paths: rotation (x, y, z) -> (y, x, -z), lists of (row, coefficient). pick, pick_back: coupling with
    the direction x and its transpose, lists of (row, coefficient).
    """

    transposed: tuple
    slope: tuple
    turn_rows: tuple
    swap_rows: tuple
    pick: tuple
    swap_paths: tuple
    turn_paths: tuple
    pick_back: tuple


class EAASConstants(NamedTuple):
    """Constants of the layer (made by ``e2former_fairchem.so3``; P path rows in (l3, m3, l1) order, M = (lmax+1)^2).

    coupling: [P, 3, M] Clebsch-Gordan coefficients C[p, b, m] with b = x, y, z.
    aligned_index: [P] the one row m of each path row with C[p, y, m] != 0 (0 where there is none).
    aligned_value: [P] that coefficient (0 where there is none).
    recursion: lmax tensors; the l-th builds the Wigner matrix of degree l+2 from degrees 1 and l+1,
        [2l+5, 3 * (2l+3)], orthonormal rows.
    row_paths: for every l3, the number of paths n_l3.
    lists: the same constants as the kernels take them.
    """

    coupling: Tensor
    aligned_index: Tensor
    aligned_value: Tensor
    recursion: tuple[Tensor, ...]
    row_paths: tuple[int, ...]
    lists: Lists


def axis_rotation(direction: Tensor) -> Tensor:
    """Rotation matrices R with R n = y for unit vectors n.

    The shortest rotation, 1 + K + K^2 / (1 + n_y), where n_y >= 0; below, n is first turned by pi about x, so the
    denominator stays above one.

    direction: n, [N, 3], unit length. Returns R, [N, 3, 3].
    """
    below = direction[:, 1] < 0
    flip = torch.where(below, -1.0, 1.0).to(direction.dtype)
    x, y, z = direction[:, 0], direction[:, 1] * flip, direction[:, 2] * flip
    # K = [n x y]_x for n = (x, y, z): n x e_y = (-z, 0, x)
    zero = torch.zeros_like(x)
    cross = torch.stack(
        [torch.stack([zero, -x, zero], -1), torch.stack([x, zero, z], -1), torch.stack([zero, -z, zero], -1)], -2
    )
    eye = torch.eye(3, dtype=direction.dtype, device=direction.device)
    rotation = eye + cross + cross @ cross / (1.0 + y)[:, None, None]
    turn = torch.stack([torch.ones_like(flip), flip, flip], -1)  # diag(1, -1, -1) where below
    return rotation * turn.unsqueeze(-2)


def wigner_blocks(rotation: Tensor, recursion: Sequence[Tensor], lmax: int) -> list[Tensor]:
    """Wigner matrices of degrees 0..lmax in e3nn's basis, built up degree by degree from the rotation itself.

    D^l = K (D^1 x D^(l-1)) K^T (docs/network.md, equation 6.19).

    rotation: [N, 3, 3]; recursion: K of degree 2 and up. Returns D^l, [N, 2l+1, 2l+1], for every l up to lmax.
    """
    nodes = rotation.shape[0]
    blocks = [rotation.new_ones(nodes, 1, 1)]
    if lmax > 0:
        blocks.append(rotation)
    for k in recursion:
        lower, k = blocks[-1], k.to(rotation.dtype)
        size = 3 * lower.shape[-1]
        kron = torch.einsum("nab,ncd->nacbd", rotation, lower).reshape(nodes, size, size)
        blocks.append(k @ kron @ k.T)
    return blocks


def flat(lists: list[list[tuple]]) -> tuple:
    """Lists of entries as one tuple: list i is at [t[i]:t[i+1]] of the tuple t itself."""
    entries: list = []
    bounds = [len(lists) + 1]
    for entry in lists:
        entries += [number for numbers in entry for number in numbers]
        bounds.append(len(lists) + 1 + len(entries))
    return (*bounds, *entries)


def _by_row(matrix: Tensor) -> list[list[tuple]]:
    """(column, coefficient) of the nonzeros of every row."""
    return [[(j, c) for j, c in enumerate(row) if abs(c) > SMALLEST] for row in matrix.tolist()]


def lists_of(coupling: Tensor, recursion: tuple[Tensor, ...], row_paths: tuple[int, ...]) -> Lists:
    """The kernels' constants; arguments as in :class:`EAASConstants`, float64 on the CPU."""
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    blocks = [_by_row(block[0]) for block in wigner_blocks(swap[None], recursion, len(row_paths) - 1)]
    along, ones = coupling[:, 0], (1,) * len(row_paths)
    back = [
        [(b, *entry) for b, found in enumerate(_by_row(block)) for entry in found]
        for block in coupling.permute(2, 1, 0)
    ]
    return Lists(
        flat(back), flat(_by_row(coupling.flatten(0, 1))), _turns(ones), _swaps(blocks, ones), flat(_by_row(along)),
        _swaps(blocks, row_paths), _turns(row_paths), flat(_by_row(along.T)),
    )  # fmt: skip


def _turns(copies: tuple[int, ...]) -> tuple:
    """Triples of a rotation about y for rows in (l, m, copy) order, copies[l] of them."""
    found, start = [], 0
    for degree, count in enumerate(copies):
        for m in range(-degree, degree + 1):
            for k in range(count):
                found += [start + (degree - m) * count + k, abs(m), int(m < 0)]
        start += (2 * degree + 1) * count
    return tuple(found)


def _swaps(blocks: list[list], copies: tuple[int, ...]) -> tuple:
    """Block-diagonal matrix for rows in (l, m, copy) order, copies[l] of them."""
    found, start = [], 0
    for block, count in zip(blocks, copies, strict=True):
        found += [[(start + j * count + k, c) for j, c in row] for row in block for k in range(count)]
        start += len(block) * count
    return flat(found)


def _frame(position: Tensor, constants: EAASConstants) -> tuple[Tensor, list[Tensor]]:
    length = position.square().sum(-1).sqrt()
    y = torch.zeros_like(position)
    y[:, 1] = 1.0
    safe = torch.where(length > 0, length, torch.ones_like(length)).unsqueeze(-1)
    direction = torch.where((length > 0).unsqueeze(-1), position / safe, y)
    return length, wigner_blocks(axis_rotation(direction), constants.recursion, len(constants.row_paths) - 1)


def _full_precision(function: Callable) -> Callable:
    """Without autocast, which would take products of the frame's matrices in 16 bits and mix dtypes."""

    @functools.wraps(function)
    def run(ctx, x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *args)

    return run


def _rotate(x: Tensor, blocks: list[Tensor], copies: Sequence[int], transpose: bool) -> Tensor:
    """Apply the Wigner matrices to rows [N, sum (2l+1) copies_l, C] in (l, m, copy) order."""
    nodes, _, channels = x.shape
    parts, start = [], 0
    for degree, (block, count) in enumerate(zip(blocks, copies, strict=True)):
        size = (2 * degree + 1) * count
        rows = x[:, start : start + size].reshape(nodes, 2 * degree + 1, count * channels)
        parts.append(torch.bmm(block.mT if transpose else block, rows).reshape(nodes, size, channels))
        start += size
    return torch.cat(parts, 1)


class _Contract(torch.autograd.Function):
    """(v, r) -> T(r) v through the axis-aligned frame, or (g, r) -> T(r)^T g."""

    @staticmethod
    @_full_precision
    def forward(ctx, x: Tensor, position: Tensor, constants: EAASConstants, transpose: bool) -> Tensor:
        ctx.constants, ctx.transpose = constants, transpose
        ctx.save_for_backward(x, position)
        length, blocks = _frame(position, constants)
        scale = (length.unsqueeze(-1) * constants.aligned_value.to(x.dtype)).unsqueeze(-1)
        paths, ones = constants.row_paths, (1,) * len(blocks)
        if not transpose:
            aligned = _rotate(x, blocks, ones, False).index_select(1, constants.aligned_index)
            return _rotate(aligned * scale, blocks, paths, True)
        rows = x.new_zeros(x.shape[0], len(blocks) ** 2, x.shape[-1])
        rows = rows.index_add(1, constants.aligned_index, _rotate(x, blocks, paths, False) * scale)
        return _rotate(rows, blocks, ones, True)

    @staticmethod
    @_full_precision
    def backward(ctx, grad: Tensor):
        (x, position), need = ctx.saved_tensors, ctx.needs_input_grad
        pair = (x, grad) if ctx.transpose else (grad, x)
        by_x = _Contract.apply(grad, position, ctx.constants, not ctx.transpose) if need[0] else None
        return by_x, _bilinear(*pair, ctx.constants) if need[1] else None, None, None


def _bilinear(paths: Tensor, rows: Tensor, constants: EAASConstants) -> Tensor:
    """sum_{p,m,c} C[p,b,m] paths[n,p,c] rows[n,m,c] -> [N, 3]."""
    pair = torch.bmm(paths, rows.mT)  # [N, P, M]
    coupling = constants.coupling.to(pair.dtype)
    return pair.flatten(1) @ coupling.transpose(1, 2).reshape(-1, 3)


@torch.compiler.disable()
def axis_aligned_contraction_reference(value: Tensor, position: Tensor, constants: EAASConstants) -> Tensor:
    r""":math:`(T(r) v)_{p} = \sum_{b,m} C_{pbm}\, r_b\, v_m`, computed as |r| D^T (pick and scale) D v.

    docs/network.md, equations 1.6 and 6.16 to 6.20.

    Differentiable to any order.

    Args:
        value: v, [N, (lmax+1)^2, C].
        position: r, [N, 3], any unit of length; zero and the polar axis are allowed.
        constants: constants.

    Returns:
        [N, P, C], in that unit times the value's.
    """
    dtype = torch.float32 if value.dtype.itemsize == 2 else value.dtype
    return _Contract.apply(value.to(dtype), position.to(dtype), constants, False)


def dense_contraction_reference(value: Tensor, position: Tensor, constants: EAASConstants) -> Tensor:
    """The same function without a frame: contraction with the full coefficient tensor. Arguments as above."""
    return torch.einsum("pbm,nb,nmc->npc", constants.coupling.to(value.dtype), position, value)
