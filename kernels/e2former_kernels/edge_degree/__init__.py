"""Edge-degree embedding: distances and directions of an atom's neighbours as its first features."""

from e2former_kernels.common.backend import operation
from e2former_kernels.edge_degree.reference import AVERAGE_DEGREE, EmbeddingSpec, edge_degree_embedding_reference

__all__ = ["AVERAGE_DEGREE", "EmbeddingSpec", "edge_degree_embedding", "edge_degree_embedding_reference"]

edge_degree_embedding = operation("e2former_kernels.edge_degree.op", "edge_degree_embedding")
