"""Rows of spherical tensors and the coefficients that couple them to a direction."""

from e2former_fairchem.so3.paths import PathTable, path_table
from e2former_fairchem.so3.rows import degree_of_row, num_rows

__all__ = ["PathTable", "degree_of_row", "num_rows", "path_table"]
