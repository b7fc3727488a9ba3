"""Equivariant attention in plain PyTorch: the definition that every kernel is held to.

Three forms of the message are here. They are the same function:

``dense``      Clebsch-Gordan contraction on every edge (the standard implementation; tensors of size E x rows x C);
``relative``   the contraction is bilinear, so it leaves the sum: accumulate the outer product of direction and value
               per receiver and contract once per atom;
``sum``        a plain weighted sum of rows prepared per node: what the node-factored form (``eaas``) needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.call import evaluate
from e2former_kernels.common.checks import check_edges, check_same, check_shape
from e2former_kernels.common.chunks import EDGE, SOURCE, TARGET, WHOLE, EdgeChunk, EdgeList, Plan, plan_of
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.equivariant_attention.attention_norm import NORMS, AttentionNorm, attention_weights
from e2former_kernels.equivariant_attention.message import (
    DIRECTIONS,
    INVERSE_DISTANCES,
    Form,
    InverseDistance,
    aggregate,
)
from e2former_kernels.equivariant_attention.score import SCORES, DotWeights, OnEdges
from e2former_kernels.radial.reference import EdgeGeometry, RadialWeights, edge_geometry, radial_network

# Working memory of one chunk where chunks are recomputed, in numbers (not bytes): 64 MB in float32.
CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True)
class AttentionSpec:
    """Static description of one equivariant attention.

    lmax: highest degree of the node features, M = (lmax+1)^2 rows.
    num_heads: H; channel c of the value belongs to head ``c mod H``.
    score: a name of :data:`e2former_kernels.equivariant_attention.score.SCORES`.
    norm: a name of :data:`e2former_kernels.equivariant_attention.attention_norm.NORMS`.
    order: of the message: 0 is the value itself, 1 its tensor product with the edge's direction, 2 that with the
        direction's harmonics of degrees 1 and 2.
    inverse_distance: how messages of order 1 and 2 divide by the distance, ``v2``: 1/(d + 1e-8), ``v1_5``:
        1/max(d, 1e-6).
    num_basis: of the Gaussian basis, which ends at the envelope's cutoff.

    Made of these: num_rows M; directions B, how many numbers of an edge multiply the value (order 0: none, 1);
    attention_norm, the entry of ``norm``; refusal, why kernels do not compute it.
    """

    lmax: int
    num_heads: int
    num_basis: int
    envelope: Envelope
    score: str = "qk"
    norm: str = "smooth"
    order: int = 1
    inverse_distance: InverseDistance = "v1_5"
    num_rows: int = field(init=False, repr=False, compare=False)
    directions: int = field(init=False, repr=False, compare=False)
    attention_norm: AttentionNorm = field(init=False, repr=False, compare=False)
    refusal: str | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("score", self.score, tuple(SCORES)),
            ("norm", self.norm, tuple(NORMS)),
            ("order", self.order, tuple(range(len(DIRECTIONS)))),
            ("inverse_distance", self.inverse_distance, INVERSE_DISTANCES),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: expected one of {allowed}, got {value!r}")
        object.__setattr__(self, "num_rows", (self.lmax + 1) ** 2)
        object.__setattr__(self, "directions", DIRECTIONS[self.order])
        object.__setattr__(self, "attention_norm", NORMS[self.norm])
        object.__setattr__(self, "refusal", refusal(self.score, self.norm))


def refusal(score: str, norm: str) -> str | None:
    """Why kernels do not compute a score and a norm; None where they do."""
    for key, name, table in (("score", score, SCORES), ("norm", norm, NORMS)):
        if not table[name].kernels:
            known = ", ".join(other for other, entry in table.items() if entry.kernels)
            return f"{key}: the kernels compute {known}, got {name!r}"
    if not SCORES[score].directional and SCORES[score].gate_and_head is not SCORES["qk"].gate_and_head:
        return f"score: without directions the kernels compute gate and head of 'qk', not those of {score!r}"
    return None


class Pieces(NamedTuple):
    """What the attention reads, in the order in which plans and calls take it."""

    vec: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    dot: Tensor | None
    radial: RadialWeights
    dot_weights: DotWeights | None

    def every(self) -> list[Tensor | None]:
        """All tensors that can be there, in the order of :meth:`flat`."""
        inner, *rest = (None,) * len(DotWeights._fields) if self.dot_weights is None else self.dot_weights
        inner = (None,) * len(RadialWeights._fields) if inner is None else inner
        return [*self[:5], *self.radial, *inner, *rest]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Pieces:
        """The inverse of :meth:`every`."""
        middle, number = 5, len(RadialWeights._fields)
        radial, inner = tensors[middle : middle + number], tensors[middle + number : middle + 2 * number]
        rest = tensors[middle + 2 * number :]
        inner = None if inner[0] is None else RadialWeights(*inner)
        dot_weights = None if rest[0] is None else DotWeights(inner, *rest)
        return cls(*tensors[:middle], RadialWeights(*radial), dot_weights)

    def flat(self) -> list[tuple[str, Tensor]]:
        """(kind, tensor) of every tensor there is; kinds as in :mod:`e2former_kernels.common.chunks`."""
        kinds = itertools.chain((EDGE, TARGET, SOURCE, SOURCE, TARGET), itertools.repeat(WHOLE))
        return [(kind, t) for kind, t in zip(kinds, self.every(), strict=False) if t is not None]

    def like(self, tensors: Sequence[Tensor]) -> Pieces:
        """The same structure with other tensors, as :meth:`flat` lists them."""
        rest = iter(tensors)
        return Pieces.of([None if t is None else next(rest) for t in self.every()])

    def outline(self) -> Pieces:
        """The same structure with empty tensors, for functions that outlive the evaluation."""
        return self.like([torch.empty(0)] * len(self.flat()))


def edge_weights(
    spec: AttentionSpec, chunk: EdgeChunk, given: Pieces, geometry: EdgeGeometry | None = None
) -> tuple[Tensor, Tensor]:
    """Weights w [E, H] of a chunk's edges, and their lengths [E], Å; arguments of :func:`attention_of_chunk`."""
    query = given.query.index_select(0, chunk.target)
    dot = None if given.dot is None else given.dot.index_select(0, chunk.target)
    if geometry is None:
        geometry = edge_geometry(given.vec, spec.num_basis, spec.envelope)
    distance, basis, envelope = geometry

    def network(weights: RadialWeights) -> Tensor:
        return radial_network(basis, *chunk.elements, weights).squeeze(1)

    on_edges = OnEdges(given.vec, distance, dot, network(given.radial), network)
    gate, head = SCORES[spec.score].gate_and_head(spec, on_edges, given.dot_weights)
    score = gate * (query * given.key).sum(-1) / math.sqrt(query.shape[-1])
    return attention_weights(score, head, envelope, chunk.target, chunk.num_nodes, spec.norm), distance


def attention_of_chunk(
    spec: AttentionSpec,
    form: Form,
    chunk: EdgeChunk,
    given: Pieces,
    coupling: Tensor | None,
    geometry: EdgeGeometry | None = None,
) -> Tensor:
    """The attention of a chunk of receivers from what :func:`attention_plan` hands it; geometry: of its edges."""
    weights, distance = edge_weights(spec, chunk, given, geometry)
    return aggregate(spec, form, weights, distance, given.vec, given.value, chunk.target, chunk.num_nodes, coupling)


def attention_plan(spec: AttentionSpec, form: Form, pieces: Pieces, edges: EdgeList, coupling: Tensor | None) -> Plan:
    """The attention in chunks, differentiable to any order (:func:`e2former_kernels.common.call.evaluate`).

    Takes the tensors of ``pieces.flat()``; other arguments as in :func:`equivariant_attention_reference`.
    """
    rows, channels = pieces.value.shape[1:]
    numbers = 6 * rows * channels + 16 * pieces.radial.hidden.shape[-1] + 8 * pieces.radial.out.shape[-2]
    outline = pieces.outline()

    def function(chunk: EdgeChunk, *tensors: Tensor) -> Tensor:
        return attention_of_chunk(spec, form, chunk, outline.like(tensors), coupling)

    return plan_of(function, edges.chunks(numbers, CHUNK_NUMBERS), pieces.flat())


def check_nodes_and_edges(
    spec: AttentionSpec, pieces: Pieces, edges: EdgeList, coupling: Tensor | None, form: Form
) -> None:
    """Raise ValueError or TypeError naming the argument on atoms or edges whose shape is not what it must be."""
    nodes, senders, query, value = edges.row_ptr.numel() - 1, edges.species.numel(), pieces.query, pieces.value
    check_edges(pieces.vec, edges)
    if query.dim() != 3:
        raise ValueError(f"query: expected [N, H, S], got {tuple(query.shape)}")
    check_shape("query", query, "N, H, S", (nodes, spec.num_heads, query.shape[-1]))
    check_shape("key", pieces.key, "N', H, S", (senders, *query.shape[1:]))
    if value.dim() != 3:
        raise ValueError(f"value: expected [N', (lmax+1)^2, C], got {tuple(value.shape)}")
    rows, dims = (value.shape[1], "R") if form == "sum" else (spec.num_rows, "(lmax+1)^2")
    check_shape("value", value, f"N', {dims}, C", (senders, rows, value.shape[-1]))
    if value.shape[-1] % spec.num_heads:
        raise ValueError(f"value: {value.shape[-1]} channels are not a multiple of num_heads = {spec.num_heads}")
    if SCORES[spec.score].directional:
        if pieces.dot is None or pieces.dot_weights is None:
            raise ValueError(f"dot, dot_weights: score {spec.score!r} needs both, got None")
        check_shape("dot", pieces.dot, "N, (lmax+1)^2, D", (nodes, spec.num_rows, pieces.dot.shape[-1]))
    if spec.order > 0 and form != "sum":
        number = spec.directions
        if coupling is None:
            raise ValueError(f"coupling: order {spec.order} needs the coefficients [P, {number}, (lmax+1)^2], got None")
        check_shape("coupling", coupling, f"P, {number}, (lmax+1)^2", (coupling.shape[0], number, spec.num_rows))


@torch.compiler.disable()
def equivariant_attention_reference(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dot: Tensor | None,
    vec: Tensor,
    edges: EdgeList,
    radial: RadialWeights,
    dot_weights: DotWeights | None = None,
    coupling: Tensor | None = None,
    *,
    form: Form = "relative",
    recompute: bool = True,
    geometry: EdgeGeometry | None = None,
) -> Tensor:
    r"""Equivariant attention over a receiver-sorted edge list (docs/network.md, sections 6.2 to 6.5).

    For atom i and head h: a_ij = g_ij <q_i, k_j> / sqrt(S), weights from :func:`attention_weights`, messages from
    :func:`aggregate`.

    Differentiable to any order in every floating-point input. Keys, values and species may have further rows,
    N' >= N: atoms that send and do not receive.

    Args:
        spec: what to compute.
        query: [N, H, S].
        key: [N', H, S].
        value: [N', M, C]; with ``form="sum"`` [N', R, C], any rows.
        dot: [N, M, D], for the ``qk_dot*`` scores.
        vec: [E, 3] = r_i - r_j - shift, Å (from neighbour to receiver).
        edges: sorted by receiver; their species are rows of the radial network's embeddings by element.
        radial: weights of the radial network.
        dot_weights: weights of the directional gate, for the ``qk_dot*`` scores.
        coupling: [P, B, M], coefficients of the path rows; for orders 1 and 2 but with ``form="sum"``.
        form: see the module.
        recompute: evaluate in chunks and recompute in every derivative, so that nothing of edge size outlives a chunk;
            False keeps edge tensors for the backward pass, which is faster for small systems.
        geometry: of ``vec``, where a caller has it for several layers; only without recomputation.

    Returns:
        [N, M, C] (order 0), [N, P, C] (orders 1 and 2) or [N, R, C] (``form="sum"``).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    if geometry is not None and recompute:
        raise ValueError("geometry: expected None with recompute=True, which keeps no edge tensors")
    pieces = Pieces(vec, query, key, value, dot, radial, dot_weights)
    check_nodes_and_edges(spec, pieces, edges, coupling, form)
    check_same("query", query, key=key)
    if recompute:
        plan = attention_plan(spec, form, pieces, edges, coupling)
        return evaluate(plan, *(t for _, t in pieces.flat()))[0]
    (whole,), source = edges.chunks_of(vec.shape[0]), edges.source
    pieces = pieces._replace(key=key.index_select(0, source), value=value.index_select(0, source))
    return attention_of_chunk(spec, form, whole, pieces, coupling, geometry)
