"""Rows of spherical tensors and the coefficients that couple them to a direction."""

from e2former_fairchem.so3.paths import Paths, make_paths
from e2former_fairchem.so3.rows import num_rows

__all__ = ["Paths", "make_paths", "num_rows"]
