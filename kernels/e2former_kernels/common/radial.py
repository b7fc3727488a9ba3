"""The radial network: distance basis and two species -> a few hundred numbers for every edge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.tables import table_rows

LAYER_NORM_EPS = 1e-5


class RadialWeights(NamedTuple):
    r"""Weights of G radial networks that share a distance basis.

    The first linear layer of SPEC's network reads ``[phi(d); T[Z_i]; S[Z_j]]``. Its species columns are folded
    into one row per element, so an edge costs ``n_b`` columns instead of ``n_b + 2 * embedding width``.
    Widths: n_b basis functions, h hidden, K outputs, Z rows of the element tables.
    """

    basis: Tensor  # [G, h, n_b]
    target_table: Tensor  # [Z, G, h], the first layer's bias included
    source_table: Tensor  # [Z, G, h]
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
    :math:`\Delta = r_c/(n_b-1)`.

    distance: [E], Å. cutoff: r_c, Å. Returns [E, num_basis], unitless.
    """
    spacing = cutoff / (num_basis - 1)
    centre = torch.arange(num_basis, dtype=distance.dtype, device=distance.device) * spacing
    scaled = (distance.unsqueeze(-1) - centre) * (0.5 / spacing)
    return torch.exp(-0.5 * scaled * scaled)


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [E, G, I], weight [G, O, I], bias [G, O] -> [E, G, O]."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0], bias[0])
    return torch.baddbmm(bias.unsqueeze(1), x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer norm over the last axis with one affine map per group: x [E, G, h], weight and bias [G, h]."""
    if weight is None or bias is None:
        return x
    if weight.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], LAYER_NORM_EPS)
    return F.layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS) * weight + bias


def radial_hidden(basis: Tensor, target_species: Tensor, source_species: Tensor, weights: RadialWeights) -> Tensor:
    """All of :func:`radial_network` but its last linear layer. Returns [E, G, h]."""
    groups, hidden, num_basis = weights.basis.shape
    x = F.linear(basis, weights.basis.reshape(groups * hidden, num_basis)).view(-1, groups, hidden)
    x = x + table_rows(weights.target_table, target_species) + table_rows(weights.source_table, source_species)
    x = F.silu(_layer_norm(x, weights.norm0_weight, weights.norm0_bias))
    x = _grouped_linear(x, weights.hidden, weights.hidden_bias)
    return F.silu(_layer_norm(x, weights.norm1_weight, weights.norm1_bias))


def radial_network(basis: Tensor, target_species: Tensor, source_species: Tensor, weights: RadialWeights) -> Tensor:
    r"""``Linear(SiLU(LN(Linear(SiLU(LN(W0 [phi; T[Z_i]; S[Z_j]] + b0))))))`` for G networks at once.

    basis: [E, n_b]. target_species, source_species: [E] rows of the element tables. Returns [E, G, K].
    """
    x = radial_hidden(basis, target_species, source_species, weights)
    return _grouped_linear(x, weights.out, weights.out_bias)
