"""Queries and keys: scalars made from all degrees of spherical tensors."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.query_key.reference import QueryKeyWeights, query_key_reference

__all__ = ["QueryKeyWeights", "query_key", "query_key_reference"]

if triton_installed():
    from e2former_kernels.query_key.op import query_key
else:

    def query_key(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("query_key: the triton package is not installed")
