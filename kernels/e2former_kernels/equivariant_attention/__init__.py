"""Equivariant attention over neighbours: E2Former-V2's on-the-fly operation (arXiv:2601.16622)."""

from e2former_kernels.common.backend import operation
from e2former_kernels.equivariant_attention.reference import AttentionSpec, equivariant_attention_reference
from e2former_kernels.equivariant_attention.score import DotWeights

__all__ = ["AttentionSpec", "DotWeights", "equivariant_attention", "equivariant_attention_reference"]

equivariant_attention = operation("e2former_kernels.equivariant_attention.op", "equivariant_attention")
