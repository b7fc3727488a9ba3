"""The attention's scores: each one's formula (the definition), its weights, and its share of working memory.

docs/network.md, section 6.2. A score is g <q, k> / sqrt(S): the gate g and the head p, which multiplies the weight, are
what scores differ in. A new one is an entry of :data:`SCORES`. Kernels know those whose entry says so: gate and head of
the directional ones are in ``score_directional.py`` and ``kernels_directional.py``, others are the radial network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.checks import check_radial
from e2former_kernels.common.harmonics import solid_harmonics
from e2former_kernels.radial.reference import RadialWeights

if TYPE_CHECKING:
    from e2former_kernels.equivariant_attention.reference import AttentionSpec


Shapes = dict[str, tuple[str, tuple[int, ...]]]


class DotWeights(NamedTuple):
    """Weights of the directional gate.

    ``qk_dot``: ``radial`` (K = (lmax+1) * D) and ``weight`` [H, (lmax+1)*D], ``bias`` [H]; the rest is None.
    ``qk_dot_scalar``: ``weight`` [H, H], ``bias`` [H], ``norm_weight``, ``norm_bias`` [H], ``out`` [H, H],
    ``out_bias`` [H]; ``radial`` is None (the gate's radial factor is the rear part of the main network's result).
    """

    radial: RadialWeights | None
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    out: Tensor | None = None
    out_bias: Tensor | None = None


class OnEdges(NamedTuple):
    """What gates and heads are made of.

    vec: [E, 3], r_i - r_j, Å; distance: [E], its length; dot: [E, M, D], the receivers' projection, or None. features:
    [E, O], of the attention's radial network. network: the result [E, K] of another one.
    """

    vec: Tensor
    distance: Tensor
    dot: Tensor | None
    features: Tensor
    network: Callable[[RadialWeights], Tensor]


class Score(NamedTuple):
    """One score.

    gate_and_head: g and p, [E, H] each. outputs: O / H. kernels: the kernels know it. directional: it takes ``dot`` and
    ``dot_weights``. Only then: unit, the kernels' harmonics are those of the direction, not of the vector; weights
    checks their radial network and gives the shapes of the others, for (spec, weights, value, D); numbers and second
    are what an edge takes beside that of all scores, in value and first derivative, and in the second, for
    (spec, h, D).
    """

    gate_and_head: Callable[[AttentionSpec, OnEdges, DotWeights | None], tuple[Tensor, Tensor]]
    outputs: int
    kernels: bool = False
    directional: bool = False
    unit: bool = False
    weights: Callable[[AttentionSpec, DotWeights, Tensor, int], Shapes] | None = None
    numbers: Callable[[AttentionSpec, int, int], int] | None = None
    second: Callable[[AttentionSpec, int, int], int] | None = None


def _contracted(harmonics: Tensor, dot: Tensor, lmax: int) -> Tensor:
    """z[l, k] = sum_m Y^l_m D_i[l, m, k], [E, (lmax+1) D]. harmonics: [E, M]; dot: [E, M, D]."""
    product = harmonics.to(dot.dtype).unsqueeze(-1) * dot
    return torch.cat([product[:, l * l : (l + 1) ** 2].sum(1) for l in range(lmax + 1)], -1)


def _qk(spec: AttentionSpec, given: OnEdges, weights: None) -> tuple[Tensor, Tensor]:
    """Gate and head are the radial network's."""
    return given.features[:, : spec.num_heads], given.features[:, spec.num_heads :]


def _qk_dot(spec: AttentionSpec, given: OnEdges, weights: DotWeights) -> tuple[Tensor, Tensor]:
    """g = W (z * R) + b, equation 6.5: R of a network of its own, z with "integral"-normalised harmonics of vec / d."""
    factor = given.network(weights.radial)
    harmonics = solid_harmonics(given.vec / given.distance.unsqueeze(-1), spec.lmax) / math.sqrt(4 * math.pi)
    z = _contracted(harmonics, given.dot, spec.lmax)
    return F.linear(z * factor, weights.weight, weights.bias), given.features


def _qk_dot_weights(spec: AttentionSpec, weights: DotWeights, value: Tensor, width: int) -> Shapes:
    heads, columns = spec.num_heads, (spec.lmax + 1) * width
    check_radial("dot_weights.radial", weights.radial, "value", value, 1, spec.num_basis, columns)
    return {"bias": ("H", (heads,)), "weight": ("H, (lmax+1) D", (heads, columns))}


def _qk_dot_scalar(spec: AttentionSpec, given: OnEdges, weights: DotWeights) -> tuple[Tensor, Tensor]:
    """g = W2 SiLU(LN(W1 (z[:H] * R) + b1)) + b2, equations 6.6, 6.7: z with "component"-normalised harmonics of vec."""
    heads = spec.num_heads
    z = _contracted(solid_harmonics(given.vec, spec.lmax), given.dot, spec.lmax)
    x = F.linear(z[:, :heads] * given.features[:, heads:], weights.weight, weights.bias)
    x = F.silu(F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, 1e-5))
    return F.linear(x, weights.out, weights.out_bias), given.features[:, :heads]


def _qk_dot_scalar_weights(spec: AttentionSpec, weights: DotWeights, value: Tensor, width: int) -> Shapes:
    heads, columns = spec.num_heads, (spec.lmax + 1) * width
    if columns < heads:
        raise ValueError(f"dot: expected (lmax+1) D of at least H = {heads}, got {columns}")
    vectors = dict.fromkeys(("bias", "norm_weight", "norm_bias", "out_bias"), ("H", (heads,)))
    return vectors | dict.fromkeys(("weight", "out"), ("H, H", (heads, heads)))


#: By name, as the specification and the key ``score`` say it.
SCORES: Mapping[str, Score] = {
    "qk": Score(_qk, 2, kernels=True),
    "qk_dot": Score(
        _qk_dot,
        1,
        kernels=True,
        directional=True,
        unit=True,
        weights=_qk_dot_weights,
        numbers=lambda spec, hidden, width: 2 * (spec.lmax + 1) * width + 3 * hidden + 3 * spec.num_rows,
        second=lambda spec, hidden, width: 6 * (spec.lmax + 1) * width + 8 * hidden,
    ),
    "qk_dot_scalar": Score(
        _qk_dot_scalar,
        2,
        kernels=True,
        directional=True,
        weights=_qk_dot_scalar_weights,
        numbers=lambda spec, hidden, width: 5 * spec.num_heads + 3 * spec.num_rows,
        second=lambda spec, hidden, width: 12 * spec.num_heads,
    ),
}
