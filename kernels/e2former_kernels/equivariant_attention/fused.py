"""Value and first derivative of the attention with fused kernels, chunk by chunk; nothing of edge size is kept between.

:class:`FusedAttention` is for score ``qk``, :class:`DirectionalAttention` for the others: gate and head
(``score_directional.py``) are the features of the same kernels, and their gradients go back the same way. The second
derivative of forces is in ``second.py``; everything beyond evaluates the reference in chunks. With ``half`` the rows of
atoms that edges gather are taken to float16 first (``common/half.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.call import Call, Change
from e2former_kernels.common.chunks import EdgeChunk, EdgeList, Plan
from e2former_kernels.common.half import Rows, half_rows
from e2former_kernels.common.tiles import next_power, row_tiles
from e2former_kernels.equivariant_attention import kernels_geometry as edge_kernel
from e2former_kernels.equivariant_attention import kernels_reverse as attend_backward_kernel
from e2former_kernels.equivariant_attention import kernels_value as attend_kernel
from e2former_kernels.equivariant_attention.kernels_value import launch_contract
from e2former_kernels.equivariant_attention.reference import AttentionSpec, Form, Pieces, attention_plan
from e2former_kernels.equivariant_attention.score import DotWeights
from e2former_kernels.equivariant_attention.score_directional import DirectionalFeatures, GateNetworks
from e2former_kernels.equivariant_attention.second import second_derivative
from e2former_kernels.radial.network import RadialFeatures, RadialNetwork
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines

# Pairs are for rows in float32 and in float16 (kernels/benchmarks/NOTES.md has the measured alternatives).
# Heads, warps and edges at a time of one program of score_kernel.
SCORE_TILE = ((32, 1, 1), (32, 1, 2))
# Heads and registers of a thread for the rows of the other kernels (common/tiles.py).
ATTEND_TILE = (32, 72)
BACKWARD_TILE = ((32, 108), (64, 144))
SENDER_TILE = ((32, 72), (64, 144))
# Neighbouring heads that one lane of these holds. Two, where the widest load would be four or eight: then the heads of
# a warp are one row or two, and sums over rows stay in a lane.
EACH = 2
# Edges at a time in score_backward_kernel.
BACKWARD_EDGES = (2, 1)
# Edges whose rows attend_kernel and sender_kernel have on their way at once.
ATTEND_UNROLL = (1, 4)
SENDER_UNROLL = (2, 2)
# Positions of the inputs among the tensors of the operation: the weights of the radial network follow.
_VEC, _QUERY, _KEY, _VALUE, _RADIAL = range(5)


class Edges(NamedTuple):
    """Geometry of a chunk's edges. position: in the splines' interval ``row``; or the length, without splines."""

    vec: Tensor
    position: Tensor
    row: Tensor
    envelope: Tensor
    scale: Tensor
    source: Tensor


class Given(NamedTuple):
    """vec [E, 3], query [N, H, S], key [N', H, S], value [N', M, C]; rows in float32 or all in float16."""

    vec: Tensor
    query: Rows
    key: Rows
    value: Rows

    @property
    def half(self) -> bool:
        """Whether rows are float16."""
        return self.key.factor is not None

    @property
    def value_rows(self) -> tuple[int, int]:
        """R, H: a value row as the kernels see it."""
        _, rows, channels = self.value.numbers.shape
        heads = self.query.numbers.shape[1]
        return rows * channels // heads, heads


class Statistics(NamedTuple):
    """The softmax's shift and sum, [N, H] each, which the backward pass takes over."""

    top: Tensor
    total: Tensor


def _arguments(rows: Rows, nodes: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The arguments of a kernel for some nodes."""
    numbers = rows.numbers[nodes]
    return numbers, numbers if rows.factor is None else rows.factor[nodes]


def _rows(x: Tensor, half: bool) -> Rows:
    return half_rows(x) if half else Rows(x, None)


@dataclass(frozen=True)
class FusedAttention(Call):
    """One attention over its chunks of receivers: everything but the tensors that may need gradients.

    radial, dot_weights: as among the tensors. outline: which tensors there are. chunks: of value and first derivative;
    training_chunks: of the gradients by weights and of the second derivative. coupling: [P, 3 M] or None. splines: of
    the radial network, where its weights are frozen. half: value and first derivative gather rows in float16.
    trained: passes share the radial network. precision: ``input_precision`` of ``tl.dot``. cache: what a pass takes
    over from those before it.
    """

    spec: AttentionSpec
    form: Form
    radial: RadialWeights
    dot_weights: DotWeights | None
    outline: Pieces
    edges: EdgeList
    chunks: list[EdgeChunk]
    training_chunks: Callable[[], list[EdgeChunk]]
    coupling: Tensor | None
    splines: RadialSplines | None = None
    half: bool = False
    trained: bool = False
    precision: str = "ieee"
    cache: dict = field(default_factory=dict, compare=False)
    first_weight: ClassVar[int] = _RADIAL

    @property
    def directions(self) -> int:
        """B of the kernels."""
        return 1 if self.coupling is None else self.spec.directions

    def plan(self, tensors: list[Tensor]) -> Plan:
        coupling = None if self.coupling is None else self.coupling.unflatten(1, (self.directions, -1))
        return attention_plan(self.spec, self.form, self.outline.like(tensors), self.edges, coupling)

    def _make_networks(self) -> RadialNetwork | GateNetworks:
        return RadialNetwork(self.radial, self.spec.envelope.cutoff)

    def _networks(self) -> RadialNetwork | GateNetworks:
        """The radial networks, the same for all passes without splines: their first layer is a product in float64."""
        networks = self.cache.get("networks") or self._make_networks()
        if self.splines is None:
            self.cache["networks"] = networks
        return networks

    def gate(self, tensors: list[Tensor], *changes: Tensor) -> RadialFeatures:
        """Gate and head, with tangents along ``changes`` of the tensors between value and weights."""
        return RadialFeatures(self._networks())

    def transposed(self) -> Tensor | None:
        """The coupling's transpose."""
        return None if self.coupling is None else self.coupling.t().contiguous()

    def _edges(self, chunk: EdgeChunk, vec: Tensor, splines: RadialSplines | None) -> Edges:
        vec, source, species = vec[chunk.edges].contiguous(), chunk.source, chunk.species
        edges = vec.shape[0]
        position, envelope = vec.new_empty(edges), vec.new_empty(edges)
        scale = vec.new_empty(edges, self.directions)
        row = position if splines is None else torch.empty(edges, dtype=torch.int32, device=vec.device)
        if edges:
            edge_kernel.geometry_kernel[(math.ceil(edges / 256),)](
                vec, position, envelope, scale, row, source, chunk.target, species, species[chunk.nodes],
                source if splines is None else splines.pair_row, E=edges,
                Z=0 if splines is None else splines.pair_row.shape[0],
                intervals=0 if splines is None else splines.intervals,
                knots_per_length=0.0 if splines is None else splines.scale, SPLINE=splines is not None,
                **edge_kernel.constants_of(self.spec, self.directions, 256),
            )  # fmt: skip
        return Edges(vec, position, row, envelope, scale, source)

    def _given(self, tensors: list[Tensor], half: bool) -> Given:
        vec, *rest = tensors[:_RADIAL]
        return Given(vec, *(_rows(t.contiguous(), half) for t in rest))

    def _scores(self, chunk: EdgeChunk, edges: Edges, given: Given, features: Tensor, statistics: Statistics) -> Tensor:
        """Scores [e, H] of a chunk; fills its part of the softmax's statistics."""
        norm, (heads, width) = self.spec.attention_norm, given.query.numbers.shape[1:]
        score = edges.vec.new_empty(chunk.num_edges, heads)
        if chunk.num_nodes:
            widest, warps, together = SCORE_TILE[given.half]
            block = min(next_power(heads), widest)
            attend_kernel.score_kernel[chunk.num_nodes, math.ceil(heads / block)](
                *_arguments(given.query, chunk.nodes), *_arguments(given.key), features, edges.row, edges.position,
                edges.envelope, edges.source, chunk.row_ptr, score, statistics.top[chunk.nodes],
                statistics.total[chunk.nodes], 1.0 / math.sqrt(width), norm.constant, H=heads, S=width,
                **norm.flags, SPLINE=self.splines is not None, HALF=given.half, BH=block,
                BS=next_power(width), BE=together, num_warps=warps,
            )  # fmt: skip
        return score

    @staticmethod
    def _statistics(given: Given) -> Statistics:
        return Statistics(*(given.vec.new_empty(given.query.numbers.shape[:2]) for _ in range(2)))

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """vec [E, 3], query [N, H, S], key [N', H, S], value [N', M, C], radial weights -> [N, P or M, C]."""
        given, value = self._given(tensors, self.half), tensors[_VALUE]
        nodes, channels = given.query.numbers.shape[0], value.shape[2]
        out = value.new_empty(nodes, value.shape[1] if self.coupling is None else self.coupling.shape[0], channels)

        def finish(chunk: EdgeChunk, outer: Tensor) -> None:
            launch_contract(self.coupling, outer.view(chunk.num_nodes, -1, channels), out[chunk.nodes], self.precision)

        self.value_of_chunks(given, tensors, None if self.coupling is None else finish, out)
        return out

    def value_of_chunks(
        self,
        given: Given,
        tensors: list[Tensor],
        finish: Callable[[EdgeChunk, Tensor], None] | None,
        out: Tensor | None,
    ) -> None:
        """Sums over neighbours, chunk by chunk: to ``finish`` as [n, B, R, H], or with B = 1 without it into out.

        tensors: for the weights of the features. Keeps the softmax's statistics for :meth:`gradients_of_chunks`.
        """
        gate = self.gate(tensors) if self.splines is None else None
        rows, heads = given.value_rows
        tiles = row_tiles(rows, heads, self.directions, *ATTEND_TILE)
        statistics = self._statistics(given)

        def of_chunk(chunk: EdgeChunk) -> None:  # a function: nothing of a chunk is there when the next begins
            edges = self._edges(chunk, given.vec, self.splines)
            if gate is None:
                features = self.splines.knots
            else:
                features, _ = gate.forward(chunk, edges.vec, edges.position, keep=False)
            score = self._scores(chunk, edges, given, features, statistics)
            if finish is None:
                summed = out[chunk.nodes].view(chunk.num_nodes, 1, rows, heads)
            else:
                summed = given.vec.new_empty(chunk.num_nodes, self.directions, rows, heads)
            if summed.numel():
                attend_kernel.attend_kernel[chunk.num_nodes, math.ceil(heads / tiles["BH"])](
                    score, features, edges.row, edges.position, edges.envelope, edges.scale, *_arguments(given.value),
                    edges.source, chunk.row_ptr, statistics.top[chunk.nodes], statistics.total[chunk.nodes], summed,
                    R=rows, H=heads, **self.spec.attention_norm.flags, SPLINE=gate is None, HALF=given.half,
                    B=self.directions, EACH=min(EACH, tiles["BH"]), UNROLL=ATTEND_UNROLL[given.half], **tiles,
                )  # fmt: skip
            if finish is not None:
                finish(chunk, summed)

        for chunk in self.chunks:
            of_chunk(chunk)
        self.cache["statistics"] = statistics

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        """Gradients of the wanted inputs."""
        half = self.half
        given, channels, grad = self._given(tensors, half), tensors[_VALUE].shape[2], grad.contiguous()
        coupling = self.transposed()

        def outer(chunk: EdgeChunk) -> Rows:
            part = _rows(grad[chunk.nodes], half)
            if coupling is None:
                return part
            into = part.numbers.new_empty(chunk.num_nodes, coupling.shape[0], channels)
            launch_contract(coupling, part.numbers, into, self.precision)
            return part._replace(numbers=into)

        return self.gradients_of_chunks(given, outer, tensors, wanted)

    def gradients_of_chunks(
        self, given: Given, outer: Callable[[EdgeChunk], Rows], tensors: list[Tensor], wanted: list[int]
    ) -> list[Tensor]:
        """Gradients of wanted inputs, by chunks. outer: gradient by a chunk's sums over neighbours, [n, B, R, H]."""
        vec = given.vec
        rows, heads = given.value_rows
        width = given.query.numbers.shape[2]
        norm, directions, half = self.spec.attention_norm, self.directions, given.half
        weights = any(n >= self.first_weight for n in wanted)
        splines = None if weights else self.splines
        gate = self.gate(tensors) if splines is None else None
        if not self.trained:
            self.cache.pop("networks", None)
        known = self.cache.get("statistics") if splines is self.splines else None
        statistics = self._statistics(given) if known is None else known
        chunks = self.training_chunks() if weights else self.chunks
        fresh = vec.new_empty if len(chunks) == 1 else vec.new_zeros
        grad_vec, grad_query = torch.empty_like(vec), vec.new_empty(given.query.numbers.shape)
        by_sender = _KEY in wanted or _VALUE in wanted
        grad_key, grad_value = (fresh(t.numbers.shape) if by_sender else vec for t in (given.key, given.value))
        tiles = row_tiles(rows, heads, directions, *BACKWARD_TILE[half])
        blocks, each = math.ceil(heads / tiles["BH"]), min(EACH, tiles["BH"])
        sender_tiles, unroll = row_tiles(rows, heads, 2, *SENDER_TILE[half]), SENDER_UNROLL[half]

        def of_chunk(chunk: EdgeChunk) -> None:
            edges = self._edges(chunk, vec, splines)
            number, receivers = chunk.num_edges, chunk.num_nodes
            if gate is None:
                features = splines.knots
            else:
                features, kept = gate.forward(chunk, edges.vec, edges.position, keep=weights)
            if known is None and norm.softmax:
                self._scores(chunk, edges, given, features, statistics)
            part = outer(chunk)
            weight, pair = (vec.new_empty(number, heads) for _ in range(2))
            mean = vec.new_empty(receivers, heads)
            best = torch.empty(receivers if norm.maximum else 0, heads, dtype=torch.int64, device=vec.device)
            grad_features = vec.new_empty(number, 2 * heads) if splines is None else weight
            grad_parts = vec.new_empty(directions + 1 + (splines is not None), blocks, number)
            if receivers:
                of_features = features, edges.row, edges.position, edges.envelope
                of_softmax = statistics.top[chunk.nodes], statistics.total[chunk.nodes]
                root, width_tile = 1.0 / math.sqrt(width), next_power(width)
                constants = norm.flags | {"H": heads, "S": width, "SPLINE": splines is not None, "HALF": half}
                if number:  # it reads ahead
                    attend_backward_kernel.attend_backward_kernel[receivers, blocks](
                        *_arguments(given.query, chunk.nodes), *_arguments(given.key), *of_features, edges.scale,
                        *_arguments(given.value), *_arguments(part), edges.source, chunk.row_ptr, *of_softmax, pair,
                        weight, mean, best, grad_parts[:directions], number, root, R=rows, B=directions, BS=width_tile,
                        EACH=each, **constants, **tiles,
                    )  # fmt: skip
                attend_backward_kernel.score_backward_kernel[receivers, blocks](
                    *_arguments(given.key), *of_features, edges.source, chunk.row_ptr, *of_softmax, mean, best, pair,
                    weight, grad_features, grad_parts[directions:], grad_query[chunk.nodes], number, root,
                    norm.constant, 0.0 if splines is None else splines.scale, BH=tiles["BH"],
                    EACH=each, BS=width_tile, BE=BACKWARD_EDGES[half], **constants, num_warps=1,
                )  # fmt: skip
            if by_sender and chunk.order_ptr.numel() > 1:
                grid = chunk.order_ptr.numel() - 1, math.ceil(heads / sender_tiles["BH"])
                attend_backward_kernel.sender_kernel[grid](
                    weight, pair, edges.scale, *_arguments(part), *_arguments(given.query, chunk.nodes), chunk.target,
                    chunk.order, chunk.order_ptr, chunk.order if chunk.senders is None else chunk.senders, grad_value,
                    grad_key, R=rows, H=heads, S=width, B=directions, HALF=half, BS=next_power(width), UNROLL=unroll,
                    EACH=min(EACH, sender_tiles["BH"]), ACCUMULATE=chunk.senders is not None, **sender_tiles,
                )  # fmt: skip
            grad_distance, grad_harmonics = grad_parts, None
            if gate is not None:
                grad_distance, _, grad_harmonics = gate.backward(grad_features.view_as(features), kept, weights)
            if number:
                edge_kernel.geometry_backward_kernel[(math.ceil(number / 256),)](
                    edges.vec, grad_distance, grad_parts, grad_vec[chunk.edges], E=number, S=blocks,
                    PARTS=splines is not None, **edge_kernel.constants_of(self.spec, directions, 256),
                )  # fmt: skip
            if grad_harmonics is not None:
                gate.add_by_vec(grad_harmonics, kept, grad_vec[chunk.edges])

        for chunk in chunks:
            of_chunk(chunk)
        found = [grad_vec, grad_query, grad_key, grad_value, *(gate.found() if gate is not None else ())]
        return [found[n] for n in wanted]

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        """None where weights are among ``change.wanted``."""
        return None if max(change.wanted) >= self.first_weight else second_derivative(self, change, tensors, by)


_DOT = 4  # position of the receivers' projection among the tensors of the operation; the weights follow


class DirectionalAttention(FusedAttention):
    """The attention of these scores; beside the value's tensors it has the receivers' projection."""

    first_weight: ClassVar[int] = _DOT + 1

    def _make_networks(self) -> GateNetworks:
        return GateNetworks.of(self.radial, self.dot_weights, self.spec.envelope.cutoff)

    def gate(self, tensors: list[Tensor], *changes: Tensor) -> DirectionalFeatures:
        return DirectionalFeatures(self.spec, self._networks(), self.dot_weights, tensors[_DOT], *changes)
