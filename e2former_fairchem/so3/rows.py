"""Row layout of node features: degree l takes rows l^2 .. (l+1)^2 - 1, in e3nn's order (polar axis y).

docs/network.md, section 1.3.
"""

from __future__ import annotations


def num_rows(lmax: int) -> int:
    """Rows of a feature up to degree lmax: (lmax+1)^2."""
    return (lmax + 1) ** 2


def degree_of_row(lmax: int) -> list[int]:
    """The degree of each row: [0, 1, 1, 1, 2, ...]."""
    return [degree for degree in range(lmax + 1) for _ in range(2 * degree + 1)]
