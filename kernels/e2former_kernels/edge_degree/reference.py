"""Edge-degree embedding in plain PyTorch: the node features before the first block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.call import evaluate
from e2former_kernels.common.checks import check_edges, check_radial
from e2former_kernels.common.chunks import EDGE, WHOLE, EdgeChunk, EdgeList, Plan, plan_of
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.common.harmonics import solid_harmonics
from e2former_kernels.linear.reference import degree_of_row, so3_linear_reference
from e2former_kernels.radial.reference import EdgeGeometry, RadialWeights, edge_geometry, radial_hidden

AVERAGE_DEGREE = 23.01  # the authors' constant divisor
CHUNK_NUMBERS = 1 << 24  # working memory of one chunk, in numbers: 64 MB in float32
PAD = 4  # columns beside the sums of features, of which one is used: rows stay aligned


class EmbeddingSpec(NamedTuple):
    """Static description of the embedding: L; n_b, of the Gaussian basis; the envelope, at whose cutoff it ends."""

    lmax: int
    num_basis: int
    envelope: Envelope


def edge_degree_sums(
    spec: EmbeddingSpec,
    chunk: EdgeChunk,
    vec: Tensor,
    radial: RadialWeights,
    geometry: EdgeGeometry | None = None,
) -> Tensor:
    r"""Sums over neighbours before the networks' last linear layer, for a chunk of receivers.

    With y = u(d) Y / 23.01 and the networks' hidden features a: :math:`\sum_j y_{jlm} a_{jl}` and, in the column behind
    them, :math:`\sum_j y_{jlm}`, of which the bias is the weight.

    vec: [e, 3], of the chunk's edges; radial: as :func:`edge_degree_embedding_reference` has it, ``out`` and
    ``out_bias`` are not read; geometry: of ``vec``, where it is known. Returns [n, (lmax+1)^2, h + 4], the last three
    columns zero.
    """
    degrees = spec.lmax + 1
    distance, basis, envelope = geometry or edge_geometry(vec, *spec[1:])
    features = radial_hidden(basis, *chunk.elements, radial)
    harmonics = solid_harmonics(vec / distance.unsqueeze(-1), spec.lmax)
    y = (harmonics * (envelope / AVERAGE_DEGREE).unsqueeze(-1)).to(features.dtype).unsqueeze(-1)
    message = torch.cat([y * features.index_select(1, degree_of_row(degrees, vec.device)), F.pad(y, (0, PAD - 1))], -1)
    return message.new_zeros((chunk.num_nodes, *message.shape[1:])).index_add(0, chunk.target, message)


def edge_degree_plan(spec: EmbeddingSpec, vec: Tensor, edges: EdgeList, radial: RadialWeights) -> Plan:
    """:func:`edge_degree_sums` in chunks; takes vec and the weights before the last layer that there are."""
    groups, _, hidden = radial.hidden.shape
    numbers = 2 * (spec.lmax + 1) ** 2 * (hidden + PAD) + 8 * groups * hidden
    there = [t is not None for t in radial[:-2]]

    def function(chunk: EdgeChunk, vec: Tensor, *weights: Tensor) -> Tensor:
        rest = iter(weights)
        given = RadialWeights(*(next(rest) if t else None for t in there), None, None)
        return edge_degree_sums(spec, chunk, vec, given)

    arguments = [(EDGE, vec)] + [(WHOLE, t) for t in radial[:-2] if t is not None]
    return plan_of(function, edges.chunks(numbers, CHUNK_NUMBERS), arguments)


def last_layer(radial: RadialWeights) -> Tensor:
    """Weight of the networks' last layer with the bias as the weight of the sum of y, [L+1, C, h + 4]."""
    return torch.cat([radial.out, F.pad(radial.out_bias.unsqueeze(-1), (0, PAD - 1))], -1)


@torch.compiler.disable()
def edge_degree_embedding_reference(
    spec: EmbeddingSpec,
    vec: Tensor,
    edges: EdgeList,
    radial: RadialWeights,
    *,
    recompute: bool = True,
    geometry: EdgeGeometry | None = None,
) -> Tensor:
    r""":math:`x_i[l,m,c] = \frac{1}{23.01} \sum_j u(d_{ij}) Y^l_m(\hat r_{ij}) R_l([\phi; T_{Z_i}; S_{Z_j}])_c`.

    docs/network.md, equation 4.2. The networks' last linear layers are the same for all edges, so they leave the sum.

    Differentiable to any order.

    Args:
        spec: what to compute.
        vec: [E, 3] = r_i - r_j - shift, Å.
        edges: sorted by receiver.
        radial: lmax+1 networks (G = lmax+1) with K = C outputs.
        recompute: as in :func:`e2former_kernels.equivariant_attention.equivariant_attention_reference`, with the next.
        geometry: of ``vec``.

    Returns:
        [N, (lmax+1)^2, C].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    if geometry is not None and recompute:
        raise ValueError("geometry: expected None with recompute=True, which keeps no edge tensors")
    check_edges(vec, edges)
    check_radial("radial", radial, "radial.basis", radial.basis, spec.lmax + 1, spec.num_basis)
    if recompute:
        plan = edge_degree_plan(spec, vec, edges, radial)
        sums = evaluate(plan, vec, *(t for t in radial[:-2] if t is not None))[0]
    else:
        (whole,) = edges.chunks_of(vec.shape[0])
        sums = edge_degree_sums(spec, whole, vec, radial, geometry)
    return so3_linear_reference(sums, last_layer(radial)).to(sums.dtype)
