"""Edge-degree embedding in plain PyTorch: the node features before the first block."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.common.checks import check_senders, check_shape
from e2former_kernels.common.chunked import EDGE, WHOLE, Chunk, chunked, make_chunks
from e2former_kernels.common.geometry import EdgeGeometry, edge_geometry
from e2former_kernels.common.harmonics import solid_harmonics
from e2former_kernels.common.radial import RadialWeights, radial_network

AVERAGE_DEGREE = 23.01  # the authors' constant divisor
CHUNK_NUMBERS = 1 << 24  # working memory of one chunk, in numbers: 64 MB in float32
MIN_CHUNK_EDGES = 256  # however wide the network


@torch.compiler.disable()
def edge_degree_embedding_reference(
    lmax: int,
    cutoff: float,
    num_basis: int,
    envelope_exponent: int,
    vec: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    species: Tensor,
    radial: RadialWeights,
    *,
    recompute: bool = True,
    max_chunk_edges: int | None = None,
    geometry: EdgeGeometry | None = None,
) -> Tensor:
    r""":math:`x_i[l,m,c] = \frac{1}{23.01} \sum_j u(d_{ij}) Y^l_m(\hat r_{ij}) R_l([\phi; T_{Z_i}; S_{Z_j}])_c`.

    docs/network.md, equation 4.2.

    Differentiable to any order.

    Args:
        lmax: L.
        cutoff: r_c, Å.
        num_basis: n_b.
        envelope_exponent: of the polynomial envelope.
        vec: [E, 3] = r_i - r_j - shift, Å.
        source: [E], senders.
        target: [E], receivers, ascending.
        row_ptr: [N+1], the edges of receiver i are ``row_ptr[i]:row_ptr[i + 1]``.
        species: [N], or more rows for atoms that send and do not receive, which ``source`` counts.
        radial: lmax+1 networks (G = lmax+1) with K = C outputs.
        recompute: as in :func:`e2former_kernels.equivariant_attention.equivariant_attention_reference`, with the next
            two.
        max_chunk_edges: edges of a chunk.
        geometry: of ``vec``.

    Returns:
        [N, (lmax+1)^2, C].

    Raises:
        ValueError: shapes that do not fit.
    """
    if geometry is not None and recompute:
        raise ValueError("geometry: expected None with recompute=True, which keeps no edge tensors")
    check_shape("vec", vec, "E, 3", (source.numel(), 3))
    check_senders(species, row_ptr.numel() - 1)
    if radial.out.shape[0] != lmax + 1:
        raise ValueError(f"radial: expected lmax + 1 = {lmax + 1} networks, got {radial.out.shape[0]}")
    degree = torch.tensor([l for l in range(lmax + 1) for _ in range(2 * l + 1)], device=vec.device)

    def function(chunk: Chunk, c_vec: Tensor, *weights: Tensor) -> Tensor:
        weights_ = iter(weights)
        c_radial = RadialWeights(*(None if t is None else next(weights_) for t in radial))
        distance, basis, envelope = geometry or edge_geometry(c_vec, cutoff, num_basis, envelope_exponent)
        features = radial_network(
            basis,
            species[chunk.nodes].index_select(0, chunk.target),
            species.index_select(0, chunk.source),
            c_radial,
        )
        harmonics = solid_harmonics(c_vec / distance.unsqueeze(-1), lmax)
        harmonics = harmonics * (envelope / AVERAGE_DEGREE).unsqueeze(-1)
        message = harmonics.to(features.dtype).unsqueeze(-1) * features.index_select(1, degree)
        return message.new_zeros((chunk.num_nodes, *message.shape[1:])).index_add(0, chunk.target, message)

    arguments = [(EDGE, vec)] + [(WHOLE, t) for t in radial if t is not None]
    if not recompute:
        whole = Chunk(slice(0, row_ptr.numel() - 1), slice(0, source.numel()), source, target, None)
        return function(whole, *(t for _, t in arguments))
    if max_chunk_edges is None:
        groups, channels, hidden = radial.out.shape
        numbers = 2 * (lmax + 1) ** 2 * channels + 8 * groups * hidden
        max_chunk_edges = max(CHUNK_NUMBERS // numbers, MIN_CHUNK_EDGES)
    return chunked(function, make_chunks(row_ptr, source, target, max_chunk_edges), arguments)
