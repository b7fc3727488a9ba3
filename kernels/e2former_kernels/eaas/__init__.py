"""Equivariant axis-aligned sparsification: the tensor product with a node's own position as a re-indexing."""

from e2former_kernels.common.backend import operation
from e2former_kernels.eaas.reference import (
    EAASConstants,
    axis_aligned_contraction_reference,
    dense_contraction_reference,
)

__all__ = [
    "EAASConstants",
    "axis_aligned_contraction",
    "axis_aligned_contraction_reference",
    "dense_contraction_reference",
]

axis_aligned_contraction = operation("e2former_kernels.eaas.op", "axis_aligned_contraction")
