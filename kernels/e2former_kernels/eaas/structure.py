"""The coefficients as lists of their nonzeros: compile-time constants of the row kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from e2former_kernels.eaas.reference import EAASTables, wigner_blocks

#: Smaller coefficients are rounding.
SMALLEST = 1e-5


class Nonzeros(NamedTuple):
    """Entries of C[p, b, m] by row of a result.

    forward: P lists of (b, m, coefficient). transposed: M lists of (b, p, coefficient). slope: 3 P lists, at 3 p + b,
    of (m, coefficient).
    """

    forward: tuple
    transposed: tuple
    slope: tuple


class Frame(NamedTuple):
    """The axis-aligned frame: turn about y, swap of x and y, turn, pick, and back.

    turn_rows, turn_paths: by row m three numbers, the row -m it mixes with, |m|, and 1 where its sine has a plus.
    swap_rows, swap_paths: rotation (x, y, z) -> (y, x, -z), lists of (row, coefficient).
    pick, pick_back: coupling with the direction x and its transpose, lists of (row, coefficient).
    """

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


def nonzeros(coupling: Tensor) -> Nonzeros:
    """coupling: [P, 3, M] on the CPU."""

    def lists(array: Tensor) -> list[list[tuple]]:
        return [[(b, *entry) for b, found in enumerate(_by_row(block)) for entry in found] for block in array]

    transposed = coupling.permute(2, 1, 0)
    return Nonzeros(flat(lists(coupling)), flat(lists(transposed)), flat(_by_row(coupling.flatten(0, 1))))


def frame(tables: EAASTables) -> Frame:
    """The frame's constants; tables on the CPU in float64."""
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    blocks = [_by_row(block[0]) for block in wigner_blocks(swap[None], tables)]
    along = tables.coupling[:, 0]
    ones = (1,) * len(tables.row_paths)
    return Frame(
        _turns(ones), _swaps(blocks, ones), flat(_by_row(along)),
        _swaps(blocks, tables.row_paths), _turns(tables.row_paths), flat(_by_row(along.T)),
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


class _Cache:
    """Constants by the tensor they came from: reading them waits for the GPU, so it is done once."""

    def __init__(self, make) -> None:
        self.make, self.found = make, WeakTensorKeyDictionary()

    def __call__(self, tables: EAASTables):
        coupling = tables.coupling
        version = 0 if coupling.is_inference() else coupling._version
        known = self.found.get(coupling)
        if known is None or known[0] != version:
            moved = tables._replace(
                coupling=coupling.detach().double().cpu(),
                recursion=tuple(k.detach().double().cpu() for k in tables.recursion),
            )
            known = self.found[coupling] = (version, self.make(moved))
        return known[1]


nonzeros_of = _Cache(lambda tables: nonzeros(tables.coupling))
frame_of = _Cache(frame)
