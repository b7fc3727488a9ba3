"""Equivariant axis-aligned sparsification: the tensor product with a node's own position as a re-indexing."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.eaas.reference import (
    EAASTables,
    axis_aligned_contraction_reference,
    dense_contraction_reference,
)

__all__ = [
    "EAASTables",
    "axis_aligned_contraction",
    "axis_aligned_contraction_reference",
    "dense_contraction_reference",
]

if triton_installed():
    from e2former_kernels.eaas.op import axis_aligned_contraction
else:

    def axis_aligned_contraction(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("axis_aligned_contraction: the triton package is not installed")
