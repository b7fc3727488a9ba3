r"""Coupling of a feature with a direction: which paths there are, and their coefficients.

docs/network.md, section 1.5. A path takes degree l1 with a vector to degree l3, \|l1-1\| <= l3 <= l1+1. Its
coefficients are :math:`\sqrt{2 l_3+1}` times e3nn's 3j symbol, so that the squares for one output row sum to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from e3nn import o3
from torch import Tensor


@dataclass(frozen=True)
class PathTable:
    """The paths up to lmax. Path rows are ordered (l3, m3, l1): all paths of one output row stand together.

    Args:
        lmax: largest degree.
        paths: for every l3, the l1 of its paths, ascending.
        coupling: [P, 3, M], float64, b = x, y, z.
    """

    lmax: int
    paths: tuple[tuple[int, ...], ...]
    coupling: Tensor

    @property
    def row_paths(self) -> tuple[int, ...]:
        return tuple(len(p) for p in self.paths)


def path_table(lmax: int, reflection_equivariant: bool = False) -> PathTable:
    """Paths and coefficients for features up to ``lmax``.

    Args:
        lmax: highest degree.
        reflection_equivariant: drop the cross-product paths (l1 = l3), which are the ones that mix parities when
            degree l has parity (-1)^l.
    """
    paths = tuple(
        tuple(
            l1
            for l1 in range(max(abs(l3 - 1), 0), min(l3 + 1, lmax) + 1)
            if abs(l1 - 1) <= l3 and not (reflection_equivariant and l1 == l3)
        )
        for l3 in range(lmax + 1)
    )
    rows = []
    for l3, sources in enumerate(paths):
        blocks = {l1: o3.wigner_3j(l1, 1, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1) for l1 in sources}
        for m3 in range(2 * l3 + 1):
            for l1 in sources:
                row = torch.zeros(3, (lmax + 1) ** 2, dtype=torch.float64)
                row[:, l1 * l1 : (l1 + 1) ** 2] = blocks[l1][:, :, m3].T
                rows.append(row)
    return PathTable(lmax, paths, torch.stack(rows))
