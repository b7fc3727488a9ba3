"""Equivariant attention over neighbours: E2Former-V2's on-the-fly operation (arXiv:2601.16622)."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.equivariant_attention.reference import DotWeights, equivariant_attention_reference
from e2former_kernels.equivariant_attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "DotWeights", "equivariant_attention", "equivariant_attention_reference"]

if triton_installed():
    from e2former_kernels.equivariant_attention.op import equivariant_attention
else:

    def equivariant_attention(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("equivariant_attention: the triton package is not installed")
