"""Edge-degree embedding in plain PyTorch: the node features before the first block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.checks import check_senders, check_shape
from e2former_kernels.common.harmonics import solid_harmonics
from e2former_kernels.common.runs import EDGE, WHOLE, Chunk, LazyRuns, Plan, evaluate, make_chunks, plan_of
from e2former_kernels.linear.reference import degree_of_row, so3_linear_reference
from e2former_kernels.radial.reference import EdgeGeometry, RadialWeights, edge_geometry, radial_hidden

AVERAGE_DEGREE = 23.01  # the authors' constant divisor
CHUNK_NUMBERS = 1 << 24  # working memory of one chunk, in numbers: 64 MB in float32
MIN_CHUNK_EDGES = 256  # however wide the network


PAD = 4  # columns beside the sums of features, of which one is used: rows stay aligned


def edge_degree_sums(
    lmax: int,
    cutoff: float,
    num_basis: int,
    envelope_exponent: int,
    chunk: Chunk,
    vec: Tensor,
    species: Tensor,
    radial: RadialWeights,
    geometry: EdgeGeometry | None = None,
) -> Tensor:
    r"""Sums over neighbours before the networks' last linear layer, for a run of receivers.

    With y = u(d) Y / 23.01 and the networks' hidden features a: :math:`\sum_j y_{jlm} a_{jl}` and, in the column behind
    them, :math:`\sum_j y_{jlm}`, of which the bias is the weight.

    Args:
        chunk: the receivers and their edges.
        vec: [e, 3], of the chunk's edges.
        species: [N'], of all senders.
        radial: as :func:`edge_degree_embedding_reference` has it; ``out`` and ``out_bias`` are not read.

    Returns:
        [n, (lmax+1)^2, h + 4], the last three columns zero.
    """
    distance, basis, envelope = geometry or edge_geometry(vec, cutoff, num_basis, envelope_exponent)
    elements = species[chunk.nodes].index_select(0, chunk.target), species.index_select(0, chunk.source)
    features = radial_hidden(basis, *elements, radial)
    harmonics = solid_harmonics(vec / distance.unsqueeze(-1), lmax)
    y = (harmonics * (envelope / AVERAGE_DEGREE).unsqueeze(-1)).to(features.dtype).unsqueeze(-1)
    message = torch.cat([y * features.index_select(1, degree_of_row(lmax + 1, vec.device)), F.pad(y, (0, PAD - 1))], -1)
    return message.new_zeros((chunk.num_nodes, *message.shape[1:])).index_add(0, chunk.target, message)


def edge_degree_plan(
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
    max_chunk_edges: int | None = None,
) -> Plan:
    """:func:`edge_degree_sums` in chunks; takes vec and the weights before the last layer that there are."""
    if max_chunk_edges is None:
        groups, _, hidden = radial.out.shape
        numbers = 2 * (lmax + 1) ** 2 * (hidden + PAD) + 8 * groups * hidden
        max_chunk_edges = max(CHUNK_NUMBERS // numbers, MIN_CHUNK_EDGES)
    there = [t is not None for t in radial[:-2]]

    def function(chunk: Chunk, vec: Tensor, *weights: Tensor) -> Tensor:
        rest = iter(weights)
        given = RadialWeights(*(next(rest) if t else None for t in there), None, None)
        return edge_degree_sums(lmax, cutoff, num_basis, envelope_exponent, chunk, vec, species, given)

    chunks = LazyRuns(lambda: make_chunks(row_ptr, source, target, max_chunk_edges))
    return plan_of(function, chunks, [(EDGE, vec)] + [(WHOLE, t) for t in radial[:-2] if t is not None])


def last_layer(radial: RadialWeights) -> Tensor:
    """Weight of the networks' last layer with the bias as the weight of the sum of y, [L+1, C, h + 4]."""
    return torch.cat([radial.out, F.pad(radial.out_bias.unsqueeze(-1), (0, PAD - 1))], -1)


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

    docs/network.md, equation 4.2. The networks' last linear layers are the same for all edges, so they leave the sum.

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
    sizes = lmax, cutoff, num_basis, envelope_exponent
    if recompute:
        plan = edge_degree_plan(*sizes, vec, source, target, row_ptr, species, radial, max_chunk_edges)
        sums = evaluate(plan, vec, *(t for t in radial[:-2] if t is not None))[0]
    else:
        whole = Chunk(slice(0, row_ptr.numel() - 1), slice(0, source.numel()), source, target)
        sums = edge_degree_sums(*sizes, whole, vec, species, radial, geometry)
    return so3_linear_reference(sums, last_layer(radial)).to(sums.dtype)
