"""Linear maps of degrees and of groups of rows (docs/network.md, section 1.6)."""

from e2former_kernels.common.backend import operation
from e2former_kernels.linear.reference import grouped_linear_reference, so3_linear_reference

__all__ = ["grouped_linear", "grouped_linear_reference", "so3_linear", "so3_linear_reference", "so3_rows"]

grouped_linear = operation("e2former_kernels.linear.op", "grouped_linear")
so3_linear = operation("e2former_kernels.linear.op", "so3_linear")
so3_rows = operation("e2former_kernels.linear.op", "so3_rows")
