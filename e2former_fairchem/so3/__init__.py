"""Rows of spherical tensors, coupling coefficients and the constants of the axis-aligned frame."""

from e2former_fairchem.so3.coupling import PathTable, eaas_tables, path_table
from e2former_fairchem.so3.rows import degree_of_row, num_rows

__all__ = ["PathTable", "degree_of_row", "eaas_tables", "num_rows", "path_table"]
