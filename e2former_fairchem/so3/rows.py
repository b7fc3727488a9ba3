"""Row layout of node features: degree l takes rows l^2 .. (l+1)^2 - 1, in e3nn's order (polar axis y).

docs/network.md, section 1.3.
"""

from __future__ import annotations


def num_rows(lmax: int) -> int:
    """Rows of a feature up to degree lmax: (lmax+1)^2."""
    return (lmax + 1) ** 2
