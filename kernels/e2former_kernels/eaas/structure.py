"""The coefficients as lists of their nonzeros: compile-time constants of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.eaas.reference import wigner_blocks

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
    """The constants; arguments as in :class:`e2former_kernels.eaas.reference.EAASTables`, float64 on the CPU."""
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
