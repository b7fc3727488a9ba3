"""Queries and keys: scalars made from all degrees of spherical tensors."""

from e2former_kernels.common.backend import operation
from e2former_kernels.query_key.reference import QueryKeyWeights, query_key_reference

__all__ = ["QueryKeyWeights", "query_key", "query_key_reference"]

query_key = operation("e2former_kernels.query_key.op", "query_key")
