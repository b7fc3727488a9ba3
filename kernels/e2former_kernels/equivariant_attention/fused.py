"""Value and first derivative of the attention with fused kernels, run by run; nothing of edge size is kept between.

:class:`FusedAttention` is for score ``qk``, :class:`DirectionalAttention` for the others: gate and head (``gate.py``)
are the features of the same kernels, and their gradients go back the same way. The second derivative of forces is in
``second.py``; everything beyond evaluates the reference in chunks. With ``half`` the rows of atoms that edges gather
are taken to float16 first (``common/half.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

from e2former_kernels.common.half import Rows, half_rows
from e2former_kernels.common.runs import EdgeList, EdgeRun, Plan
from e2former_kernels.common.tiles import RowTiles, next_power, row_tiles
from e2former_kernels.equivariant_attention import kernels_geometry as edge_kernel
from e2former_kernels.equivariant_attention import kernels_reverse as attend_backward_kernel
from e2former_kernels.equivariant_attention import kernels_value as attend_kernel
from e2former_kernels.equivariant_attention.gate import GateGradients, GateNetwork, NetworkKept, RadialGate
from e2former_kernels.equivariant_attention.kernels_value import launch_contract
from e2former_kernels.equivariant_attention.reference import DotWeights
from e2former_kernels.equivariant_attention.second import geometry_launch, second_derivative
from e2former_kernels.equivariant_attention.spec import AttentionSpec
from e2former_kernels.radial.network import RadialNetwork
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.table import RadialTable

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
NORMS = {"smooth": 0, "molfm": 1, "softplus": 2, "sigmoid": 3}
# Positions of the inputs among the tensors of the operation: the weights of the radial network follow.
_VEC, _QUERY, _KEY, _VALUE, _RADIAL = range(5)


class Edges(NamedTuple):
    """Geometry of a run's edges. position: in the radial table's interval ``row``; or the length, without a table."""

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


EVERY = slice(None)


class Statistics(NamedTuple):
    """The softmax's shift and sum, [N, H] each, which the backward pass takes over."""

    top: Tensor
    total: Tensor


def _rows(x: Tensor, half: bool) -> Rows:
    return half_rows(x) if half else Rows(x, None)


@dataclass(frozen=True)
class FusedAttention:
    """One attention step over its runs of receivers: everything but the tensors that may need gradients.

    directions: B of the kernels, 3 for the relative form of order 1, else 1. coupling: [P, 3 M] or None.
    training_chunks: runs of the gradients by weights and of the second derivative. radial: the structure of the radial
    weights (which of them are there). plan: the same function for :mod:`e2former_kernels.common.runs`. table:
    splines of the radial network, where its weights are frozen. half: value and first derivative gather rows in
    float16. trained: passes share the radial network. precision: ``input_precision`` of ``tl.dot``. cache: what a pass
    takes over from those before it.
    """

    spec: AttentionSpec
    directions: int
    chunks: list[EdgeRun]
    training_chunks: Sequence[EdgeRun]
    edges: EdgeList
    coupling: Tensor | None
    radial: RadialWeights
    plan: Plan
    table: RadialTable | None = None
    half: bool = False
    trained: bool = False
    precision: str = "ieee"
    cache: dict = field(default_factory=dict, compare=False)
    first_weight: ClassVar[int] = _RADIAL

    def _weights(self, tensors: list[Tensor]) -> RadialWeights:
        rest = iter(tensors)
        return RadialWeights(*(None if t is None else next(rest) for t in self.radial))

    def _gate(self, tensors: list[Tensor], changes: Sequence[Tensor] = ()) -> RadialGate:
        """Gate and head with the gradients by their weights, and with tangents along ``changes``.

        changes: of the tensors between value and weights.
        """
        return RadialGate(self._weights(tensors[_RADIAL:]), self.spec.cutoff, self._network(tensors))

    def _make_network(self, tensors: list[Tensor]) -> RadialNetwork:
        return RadialNetwork(self._weights(tensors[_RADIAL:]), self.spec.cutoff)

    def transposed(self) -> Tensor | None:
        """The coupling's transpose."""
        if self.coupling is not None and "transposed" not in self.cache:
            self.cache["transposed"] = self.coupling.t().contiguous()
        return self.cache.get("transposed")

    def _network(self, tensors: list[Tensor]) -> RadialNetwork | None:
        """The radial network, one for all passes; None where a table stands."""
        if self.table is not None:
            return None
        if "network" not in self.cache:
            self.cache["network"] = self._make_network(tensors)
        return self.cache["network"]

    def _edges(self, chunk: EdgeRun, vec: Tensor, table: RadialTable | None) -> Edges:
        vec, source, species = vec[chunk.edges].contiguous(), self.edges.source[chunk.edges], self.edges.species
        edges = vec.shape[0]
        position, envelope = vec.new_empty(edges), vec.new_empty(edges)
        scale = vec.new_empty(edges, self.directions)
        row = position if table is None else torch.empty(edges, dtype=torch.int32, device=vec.device)
        if edges:
            grid, constants = geometry_launch(self.spec, self.directions, edges, 256)
            edge_kernel.geometry_kernel[grid](
                vec, position, envelope, scale, row, source, chunk.target, species, species[chunk.nodes],
                source if table is None else table.pair_row, Z=0 if table is None else table.pair_row.shape[0],
                intervals=0 if table is None else table.intervals,
                knots_per_length=0.0 if table is None else table.scale, TABLE=table is not None, **constants,
            )  # fmt: skip
        return Edges(vec, position, row, envelope, scale, source)

    def _features(
        self, network: RadialNetwork, chunk: EdgeRun, edges: Edges, tensors: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Features [e, 2H] of a run without a table, and what :meth:`_by_features` takes."""
        features, middle = network.forward(edges.position, *self.edges.elements(chunk))
        return features, middle

    def _by_features(
        self,
        network: RadialNetwork,
        grad: Tensor,
        kept: Tensor,
        chunk: EdgeRun,
        edges: Edges,
        tensors: list[Tensor],
        beside: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients by the distance and by what else the features know of the edge vector, from that by the features.

        Those by inputs between value and weights go to ``beside``, by position.
        """
        return network.backward(grad, kept, edges.position, *self.edges.elements(chunk)), None

    def _given(self, tensors: list[Tensor], half: bool) -> Given:
        vec, *rest = tensors[:_RADIAL]
        return Given(vec, *(_rows(t.contiguous(), half) for t in rest))

    def _scores(self, chunk: EdgeRun, edges: Edges, given: Given, features: Tensor, statistics: Statistics) -> Tensor:
        """Scores [e, H] of a run; fills its part of the softmax's statistics."""
        heads, width = given.query.numbers.shape[1:]
        score = edges.vec.new_empty(chunk.num_edges, heads)
        if chunk.num_nodes:
            widest, warps, together = SCORE_TILE[given.half]
            block = min(next_power(heads), widest)
            attend_kernel.score_kernel[chunk.num_nodes, triton.cdiv(heads, block)](
                *given.query.of(chunk.nodes), *given.key.of(EVERY), features, edges.row, edges.position,
                edges.envelope, edges.source, chunk.row_ptr, score, statistics.top[chunk.nodes],
                statistics.total[chunk.nodes], 1.0 / math.sqrt(width), self.spec.softmax_constant, H=heads, S=width,
                NORM=NORMS[self.spec.norm], TABLE=self.table is not None, HALF=given.half, BH=block,
                BS=next_power(width), BE=together, num_warps=warps,
            )  # fmt: skip
        return score

    @staticmethod
    def _statistics(given: Given) -> Statistics:
        return Statistics(*(given.vec.new_empty(given.query.numbers.shape[:2]) for _ in range(2)))

    @staticmethod
    def _tiles(tiles: RowTiles) -> dict:
        each = min(EACH, tiles.heads)
        return {"RA": tiles.rows_a, "RB": tiles.rows_b, "BH": tiles.heads, "EACH": each, "num_warps": tiles.warps}

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """vec [E, 3], query [N, H, S], key [N', H, S], value [N', M, C], radial weights -> [N, P or M, C]."""
        given, value = self._given(tensors, self.half), tensors[_VALUE]
        nodes, channels = given.query.numbers.shape[0], value.shape[2]
        out = value.new_empty(nodes, value.shape[1] if self.coupling is None else self.coupling.shape[0], channels)

        def finish(chunk: EdgeRun, outer: Tensor) -> None:
            launch_contract(self.coupling, outer.view(chunk.num_nodes, -1, channels), out[chunk.nodes], self.precision)

        self.value_of_runs(given, tensors, None if self.coupling is None else finish, out)
        return out

    def value_of_runs(
        self,
        given: Given,
        tensors: list[Tensor],
        finish: Callable[[EdgeRun, Tensor], None] | None,
        out: Tensor | None,
    ) -> None:
        """Sums over neighbours, run by run: to ``finish`` as [n, B, R, H], or with B = 1 without it into out.

        tensors: for the weights of the features. Keeps the softmax's statistics for :meth:`gradients_of_runs`.
        """
        network = self._network(tensors)
        rows, heads = given.value_rows
        tiles = row_tiles(rows, heads, self.directions, *ATTEND_TILE)
        statistics = self._statistics(given)

        def run(chunk: EdgeRun) -> None:  # a function: nothing of a run is there when the next begins
            edges = self._edges(chunk, given.vec, self.table)
            if network is None:
                features = self.table.knots
            else:
                features, _ = self._features(network, chunk, edges, tensors)
            score = self._scores(chunk, edges, given, features, statistics)
            if finish is None:
                summed = out[chunk.nodes].view(chunk.num_nodes, 1, rows, heads)
            else:
                summed = given.vec.new_empty(chunk.num_nodes, self.directions, rows, heads)
            if summed.numel():
                attend_kernel.attend_kernel[chunk.num_nodes, triton.cdiv(heads, tiles.heads)](
                    score, features, edges.row, edges.position, edges.envelope, edges.scale, *given.value.of(EVERY),
                    edges.source, chunk.row_ptr, statistics.top[chunk.nodes], statistics.total[chunk.nodes], summed,
                    R=rows, H=heads, NORM=NORMS[self.spec.norm], TABLE=network is None, HALF=given.half,
                    B=self.directions, UNROLL=ATTEND_UNROLL[given.half], **self._tiles(tiles),
                )  # fmt: skip
            if finish is not None:
                finish(chunk, summed)

        for chunk in self.chunks:
            run(chunk)
        self.cache["statistics"] = statistics

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        """Gradients of the wanted inputs."""
        half = self.half
        given, channels, grad = self._given(tensors, half), tensors[_VALUE].shape[2], grad.contiguous()
        coupling = self.transposed()

        def outer(chunk: EdgeRun) -> Rows:
            part = _rows(grad[chunk.nodes], half)
            if coupling is None:
                return part
            into = part.numbers.new_empty(chunk.num_nodes, coupling.shape[0], channels)
            launch_contract(coupling, part.numbers, into, self.precision)
            return part._replace(numbers=into)

        return self.gradients_of_runs(given, outer, tensors, wanted)

    def gradients_of_runs(
        self, given: Given, outer: Callable[[EdgeRun], Rows], tensors: list[Tensor], wanted: list[int]
    ) -> list[Tensor]:
        """Gradients of the wanted inputs, run by run. outer: gradient by a run's sums over neighbours, [n, B, R, H]."""
        vec = given.vec
        rows, heads = given.value_rows
        width = given.query.numbers.shape[2]
        norm, directions, half = NORMS[self.spec.norm], self.directions, given.half
        weights_wanted = [n for n in wanted if n >= self.first_weight]
        table = None if weights_wanted else self.table
        network = None if weights_wanted else self._network(tensors)
        if not self.trained:
            self.cache.pop("network", None)
        known = self.cache.get("statistics") if table is self.table else None
        statistics = self._statistics(given) if known is None else known
        chunks = self.training_chunks if weights_wanted else self.chunks
        fresh = vec.new_empty if len(chunks) == 1 else vec.new_zeros
        grad_vec, grad_query = torch.empty_like(vec), vec.new_empty(given.query.numbers.shape)
        by_sender = _KEY in wanted or _VALUE in wanted
        grad_key, grad_value = (fresh(t.numbers.shape) if by_sender else vec for t in (given.key, given.value))
        gate = self._gate(tensors) if weights_wanted else None
        beside: dict[int, Tensor] = {}
        tiles = row_tiles(rows, heads, directions, *BACKWARD_TILE[half])
        blocks = triton.cdiv(heads, tiles.heads)
        sender_tiles = row_tiles(rows, heads, 2, *SENDER_TILE[half])

        def run(chunk: EdgeRun) -> None:
            edges = self._edges(chunk, vec, table)
            number, receivers = chunk.num_edges, chunk.num_nodes
            if gate is not None:
                features, kept = gate.forward(chunk, self.edges.elements(chunk), edges.vec, edges.position)
            elif table is None:
                features, middle = self._features(network, chunk, edges, tensors)
            else:
                features = table.knots
            if known is None and norm <= 1:
                self._scores(chunk, edges, given, features, statistics)
            part = outer(chunk)
            weight, pair = (vec.new_empty(number, heads) for _ in range(2))
            mean = vec.new_empty(receivers, heads)
            best = torch.empty(receivers if norm == 1 else 0, heads, dtype=torch.int64, device=vec.device)
            grad_features = vec.new_empty(number, 2 * heads) if table is None else weight
            grad_parts = vec.new_empty(directions + 1 + (table is not None), blocks, number)
            if receivers:
                of_features = features, edges.row, edges.position, edges.envelope
                of_softmax = statistics.top[chunk.nodes], statistics.total[chunk.nodes]
                root, width_tile = 1.0 / math.sqrt(width), next_power(width)
                constants = {"H": heads, "S": width, "NORM": norm, "TABLE": table is not None, "HALF": half}
                if number:  # it reads ahead
                    attend_backward_kernel.attend_backward_kernel[receivers, blocks](
                        *given.query.of(chunk.nodes), *given.key.of(EVERY), *of_features, edges.scale,
                        *given.value.of(EVERY), *part.of(EVERY), edges.source, chunk.row_ptr, *of_softmax, pair, weight,
                        mean, best, grad_parts[:directions], number, root, R=rows, B=directions, BS=width_tile,
                        **constants, **self._tiles(tiles),
                    )  # fmt: skip
                attend_backward_kernel.score_backward_kernel[receivers, blocks](
                    *given.key.of(EVERY), *of_features, edges.source, chunk.row_ptr, *of_softmax, mean, best, pair,
                    weight, grad_features, grad_parts[directions:], grad_query[chunk.nodes], number, root,
                    self.spec.softmax_constant, 0.0 if table is None else table.scale, BH=tiles.heads,
                    EACH=min(EACH, tiles.heads), BS=width_tile, BE=BACKWARD_EDGES[half], **constants, num_warps=1,
                )  # fmt: skip
            if by_sender and chunk.order_ptr.numel() > 1:
                grid = chunk.order_ptr.numel() - 1, triton.cdiv(heads, sender_tiles.heads)
                attend_backward_kernel.sender_kernel[grid](
                    weight, pair, edges.scale, *part.of(EVERY), *given.query.of(chunk.nodes), chunk.target, chunk.order,
                    chunk.order_ptr, chunk.order if chunk.senders is None else chunk.senders, grad_value, grad_key,
                    R=rows, H=heads, S=width, B=directions, HALF=half, BS=next_power(width),
                    ACCUMULATE=chunk.senders is not None, UNROLL=SENDER_UNROLL[half], **self._tiles(sender_tiles),
                )  # fmt: skip
            grad_distance, grad_further, grad_harmonics = grad_parts, None, None
            if gate is not None:
                grad_distance, _, grad_harmonics = gate.backward(grad_features.view_as(features), kept, weights=True)
            elif table is None:
                grad_distance, grad_further = self._by_features(
                    network, grad_features, middle, chunk, edges, tensors, beside
                )
            if number:
                grid, constants = geometry_launch(self.spec, self.directions, number, 256)
                edge_kernel.geometry_backward_kernel[grid](
                    edges.vec, grad_distance, grad_parts, grad_vec[chunk.edges], S=blocks, PARTS=table is not None,
                    **constants,
                )  # fmt: skip
            if grad_further is not None:
                network.add_by_vec(grad_further, edges.vec, grad_vec[chunk.edges])
            if grad_harmonics is not None:
                gate.add_by_vec(grad_harmonics, kept, grad_vec[chunk.edges])

        for chunk in chunks:
            run(chunk)
        found = dict(enumerate([grad_vec, grad_query, grad_key, grad_value])) | beside
        if gate is not None:
            found |= dict(enumerate(gate.found(), _RADIAL))
        return [found[n] for n in wanted]

    def second(
        self,
        cotangents: list[Tensor | None],
        grad: Tensor,
        tensors: list[Tensor],
        wanted: list[int],
        again: list[int],
    ) -> list[Tensor] | None:
        """See :class:`e2former_kernels.common.step.Step`; None where weights are among ``wanted``."""
        return second_derivative(self, cotangents, grad, tensors, wanted, again)


_DOT = 4  # position of the receivers' projection among the tensors of the operation; the weights follow


@dataclass(frozen=True, kw_only=True)
class DirectionalAttention(FusedAttention):
    """The attention step of these scores; beside the value's tensors it has the receivers' projection.

    weights_of: the radial weights and those of the gate, from all tensors.
    """

    weights_of: Callable[[list[Tensor]], tuple[RadialWeights, DotWeights]]
    first_weight: ClassVar[int] = _DOT + 1

    def _make_network(self, tensors: list[Tensor]) -> GateNetwork:
        return GateNetwork(self.spec, *self.weights_of(tensors))

    def _features(
        self, network: GateNetwork, chunk: EdgeRun, edges: Edges, tensors: list[Tensor]
    ) -> tuple[Tensor, NetworkKept]:
        return network.forward(chunk, edges, self.edges.elements(chunk), tensors[_DOT][chunk.nodes].contiguous())

    def _by_features(
        self,
        network: GateNetwork,
        grad: Tensor,
        kept: NetworkKept,
        chunk: EdgeRun,
        edges: Edges,
        tensors: list[Tensor],
        beside: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        dot = tensors[_DOT]
        if _DOT not in beside:
            beside[_DOT] = dot.new_empty(dot.shape)
        arguments = chunk, edges, self.edges.elements(chunk), dot[chunk.nodes].contiguous(), beside[_DOT][chunk.nodes]
        return network.backward(grad, kept, *arguments)

    def _gate(self, tensors: list[Tensor], changes: Sequence[Tensor] = ()) -> GateGradients:
        return GateGradients(self.spec, *self.weights_of(tensors), tensors[_DOT], *changes)
