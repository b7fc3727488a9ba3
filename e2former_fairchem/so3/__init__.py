"""Rows of spherical tensors and the coefficients that couple them to a direction."""

from e2former_fairchem.so3.paths import PathTable, path_table
from e2former_fairchem.so3.rows import num_rows

__all__ = ["PathTable", "num_rows", "path_table"]
