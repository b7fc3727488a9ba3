r"""Coupling of a feature with a direction: which paths there are, and their coefficients.

docs/network.md, section 1.5. A path takes degree l1 with a harmonic of degree l2 to degree l3,
\|l1-l2\| <= l3 <= l1+l2; l2 = 1 is the direction itself. Its
coefficients are :math:`\sqrt{2 l_3+1}` times e3nn's 3j symbol, so that the squares for one output row sum to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from e3nn import o3
from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """The paths up to lmax. Path rows are ordered (l3, m3, l2, l1): all paths of one output row stand together.

    Args:
        lmax: largest degree.
        paths: for every l3, the (l1, l2) of its paths.
        coupling: [P, B, M], float64, b = x, y, z (l2 = 1), and for order 2 the five of l2 = 2.
    """

    lmax: int
    paths: tuple[tuple[tuple[int, int], ...], ...]
    coupling: Tensor

    @property
    def row_paths(self) -> tuple[int, ...]:
        return tuple(len(p) for p in self.paths)


def make_paths(lmax: int, reflection_equivariant: bool = False, order: int = 1) -> Paths:
    """Paths and coefficients for features up to ``lmax``.

    Args:
        lmax: highest degree.
        reflection_equivariant: drop the paths whose degrees have an odd sum (cross products), which are the ones that
            mix parities when degree l has parity (-1)^l.
        order: highest degree of the direction's harmonics, 1 or 2.
    """
    degrees = range(1, order + 1)
    paths = tuple(
        tuple(
            (l1, l2)
            for l2 in degrees
            for l1 in range(lmax + 1)
            if abs(l1 - l2) <= l3 <= l1 + l2 and not (reflection_equivariant and (l1 + l2 + l3) % 2)
        )
        for l3 in range(lmax + 1)
    )
    rows = []
    for l3, pairs in enumerate(paths):
        blocks = [o3.wigner_3j(*pair, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1) for pair in pairs]
        for m3 in range(2 * l3 + 1):
            for (l1, l2), block in zip(pairs, blocks, strict=True):
                row = torch.zeros((order + 1) ** 2 - 1, (lmax + 1) ** 2, dtype=torch.float64)
                row[l2 * l2 - 1 : (l2 + 1) ** 2 - 1, l1 * l1 : (l1 + 1) ** 2] = block[:, :, m3].T
                rows.append(row)
    return Paths(lmax, paths, torch.stack(rows))
