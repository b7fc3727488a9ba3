"""Radial networks: a distance and two elements -> a few hundred numbers for every edge (docs/network.md, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.envelope import Envelope


class _EmbeddingRows(torch.autograd.Function):
    """Rows of a small embedding; the gradient on a GPU is a matrix product with the one-hot index, not a scatter."""

    @staticmethod
    def forward(ctx, embedding: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = embedding.shape[0]
        return embedding.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return _EmbeddingSums.apply(grad, index, ctx.rows), None


class _EmbeddingSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return embedding_sums(values, index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return _EmbeddingRows.apply(grad, index), None, None


def embedding_sums(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums of the values of each row of the embedding, in a fixed order. values: [E, ...]; index: [E]. No gradient."""
    if values.device.type == "cpu":  # where a scatter adds in order
        return values.new_zeros(rows, *values.shape[1:]).index_add_(0, index, values)
    one_hot = (index.unsqueeze(0) == torch.arange(rows, device=index.device).unsqueeze(1)).to(values.dtype)
    return (one_hot @ values.flatten(1)).view(rows, *values.shape[1:])


def embedding_rows(embedding: Tensor, index: Tensor) -> Tensor:
    """Rows of an embedding of a hundred rows or so, with a deterministic gradient. embedding: [Z, ...]; index: [E]."""
    return _EmbeddingRows.apply(embedding, index)


LAYER_NORM_EPS = 1e-5


class RadialWeights(NamedTuple):
    r"""Weights of G radial networks that share a distance basis (docs/network.md, equations 3.5 and 3.6).

    The first linear layer reads ``[phi(d); T[Z_i]; S[Z_j]]``. Its species columns are folded into one row per
    element, so an edge costs ``n_b`` columns instead of ``n_b + 2 * embedding width``.
    Widths: n_b basis functions, h hidden, K outputs, Z rows of the embeddings by element.
    """

    basis: Tensor  # [G, h, n_b]
    target_embedding: Tensor  # [Z, G, h], the first layer's bias included
    source_embedding: Tensor  # [Z, G, h]
    norm0_weight: Tensor | None  # [G, h]; None: no layer norms
    norm0_bias: Tensor | None
    hidden: Tensor  # [G, h, h]
    hidden_bias: Tensor  # [G, h]
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    out: Tensor  # [G, K, h]
    out_bias: Tensor  # [G, K]


def gaussian_basis(distance: Tensor, cutoff: float, num_basis: int) -> Tensor:
    r""":math:`\phi_k(d) = \exp(-\frac12 ((d-\mu_k)/(2\Delta))^2)`, :math:`\mu_k = k\Delta`,
    :math:`\Delta = r_c/(n_b-1)` (docs/network.md, equation 3.1).

    distance: [E], and cutoff r_c, Å; num_basis: n_b, at least 2. Returns [E, n_b], no unit.
    """
    spacing = cutoff / (num_basis - 1)
    centre = torch.arange(num_basis, dtype=distance.dtype, device=distance.device) * spacing
    return torch.exp((distance.unsqueeze(-1) - centre).square() * (-0.125 / spacing**2))


def _norm_silu(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """SiLU, after a layer norm over the last axis where there are weights [G, h] for it: x [G, E, h]."""
    if weight is None or bias is None:
        return F.silu(x)
    if weight.shape[0] == 1:
        return F.silu(F.layer_norm(x, x.shape[-1:], weight[0], bias[0], LAYER_NORM_EPS))
    x = F.layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
    return F.silu(torch.addcmul(bias.unsqueeze(1), x, weight.unsqueeze(1)))


def first_layer(basis: Tensor, target_species: Tensor, source_species: Tensor, weights: RadialWeights) -> Tensor:
    """The first linear layer, [G, E, h]: groups first, then all that is kept lies as the matrix products want it."""
    x = embedding_rows(weights.target_embedding, target_species)
    x = x + embedding_rows(weights.source_embedding, source_species)
    return torch.matmul(basis, weights.basis.transpose(1, 2)) + x.transpose(0, 1)


def hidden_layers(first: Tensor, weights: RadialWeights) -> Tensor:
    """What follows the first linear layer, up to the last: [G, E, h] both."""
    x = _norm_silu(first, weights.norm0_weight, weights.norm0_bias)
    x = torch.baddbmm(weights.hidden_bias.unsqueeze(1), x, weights.hidden.transpose(1, 2))
    return _norm_silu(x, weights.norm1_weight, weights.norm1_bias)


def last_layer(hidden: Tensor, weights: RadialWeights) -> Tensor:
    """The last linear layer: [G, E, h] -> [G, E, K]."""
    return torch.baddbmm(weights.out_bias.unsqueeze(1), hidden, weights.out.transpose(1, 2))


def radial_hidden(basis: Tensor, target_species: Tensor, source_species: Tensor, weights: RadialWeights) -> Tensor:
    """All of :func:`radial_network` but its last linear layer. Returns [E, G, h]."""
    return hidden_layers(first_layer(basis, target_species, source_species, weights), weights).transpose(0, 1)


def radial_network(basis: Tensor, target_species: Tensor, source_species: Tensor, weights: RadialWeights) -> Tensor:
    r"""``Linear(SiLU(LN(Linear(SiLU(LN(W0 [phi; T[Z_i]; S[Z_j]] + b0))))))`` for G networks at once.

    docs/network.md, equation 3.5. basis: [E, n_b]; target_species, source_species: [E], rows of the embeddings by
    element, of receivers and senders; weights: of G networks with K outputs. Returns [E, G, K].
    """
    x = hidden_layers(first_layer(basis, target_species, source_species, weights), weights)
    return last_layer(x, weights).transpose(0, 1)


class EdgeGeometry(NamedTuple):
    """distance: [E], Å. basis: [E, n_b]. envelope: [E]. The same for all layers on one graph."""

    distance: Tensor
    basis: Tensor
    envelope: Tensor


def edge_geometry(vec: Tensor, num_basis: int, envelope: Envelope) -> EdgeGeometry:
    """Lengths, Gaussian basis and envelope of edges (docs/network.md, sections 3.1 and 3.2).

    Differentiable to any order. vec: [E, 3], r_i - r_j, Å; the basis of n_b numbers ends at the envelope's cutoff.
    """
    distance = vec.square().sum(-1).sqrt()
    basis = gaussian_basis(distance, envelope.cutoff, num_basis)
    return EdgeGeometry(distance, basis, envelope(distance))
