"""Invariants of spherical tensors: products of two linear maps, contracted over each degree."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.query_key.reference import invariants_reference

__all__ = ["invariants", "invariants_reference"]

if triton_installed():
    from e2former_kernels.query_key.op import invariants
else:

    def invariants(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("invariants: the triton package is not installed")
