"""Equivariant axis-aligned sparsification: the tensor product with a node's own position as a re-indexing."""

from e2former_kernels.eaas.reference import (
    EAASTables,
    axis_aligned_contraction_reference,
    dense_contraction_reference,
)

__all__ = ["EAASTables", "axis_aligned_contraction_reference", "dense_contraction_reference"]
