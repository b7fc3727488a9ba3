"""Edge-degree embedding: distances and directions of an atom's neighbours as its first features."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.edge_degree.reference import AVERAGE_DEGREE, edge_degree_embedding_reference

__all__ = ["AVERAGE_DEGREE", "edge_degree_embedding", "edge_degree_embedding_reference"]

if triton_installed():
    from e2former_kernels.edge_degree.op import edge_degree_embedding
else:

    def edge_degree_embedding(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("edge_degree_embedding: the triton package is not installed")
