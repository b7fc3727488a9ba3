r"""Edge-degree embedding with Triton kernels.

The last linear layer of the radial networks is the same for all edges, so it leaves the sum: the edges add up
harmonics times hidden features, and one matrix product per degree follows for every atom,
:math:`x_{i l m} = W_l \sum_j y_{jlm} a_{jl} + b_l \sum_j y_{jlm}`, y = envelope times harmonics over the mean degree.

Second derivative: the first one by vec is J^T grad, and L = <c, J^T grad> = <grad, J c> with J c the change of the
output along the cotangent c. The sums :math:`\sum_e Y_{em} a_{e l(m) c}` change by those of Y' a + Y a' with Y' the
change of the harmonics and a' that of the radial features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.backend import EXACT, Mode, triton_problem
from e2former_kernels.common.checks import check_edge_list, check_same_device, check_same_dtype
from e2former_kernels.common.registered import Settings, flags, register, there, with_gaps
from e2former_kernels.common.runs import EdgeList, EdgeRun, LazyRuns, Plan, run_size
from e2former_kernels.common.step import run_step
from e2former_kernels.edge_degree.harmonics import (
    harmonics_second,
    harmonics_tangent,
    weighted_harmonics,
    weighted_harmonics_backward,
)
from e2former_kernels.edge_degree.kernels import (
    harmonic_dot,
    harmonic_features,
    harmonic_sum,
    place_edges,
    segment_sum,
    spline_backward,
    spline_sum,
)
from e2former_kernels.edge_degree.reference import PAD, edge_degree_plan, last_layer
from e2former_kernels.linear.op import so3_linear
from e2former_kernels.radial.network import RadialGradients, RadialNetwork, add_gradients
from e2former_kernels.radial.reference import RadialWeights, check_radial
from e2former_kernels.radial.table import RadialTable, check_table

# Working memory of a run of edges, in numbers, as in ``equivariant_attention/op.py``.
FUSED_NUMBERS = 3 << 25
TRAINING_NUMBERS = 5 << 26
SECOND_NUMBERS = 3 << 27


@dataclass(frozen=True)
class _Embedding:
    """One embedding over its runs of receivers. Result: [N, M, h + 4], see :meth:`join`."""

    lmax: int
    cutoff: float
    num_basis: int
    exponent: int
    chunks: list[EdgeRun]
    edges: EdgeList
    radial: RadialWeights  # the structure: which tensors there are
    trained: bool
    plan: Plan  # of derivatives that have no kernels
    table: RadialTable | None  # of the networks without their last layer, where the weights are frozen
    training_chunks: Sequence[EdgeRun]  # runs of gradients by weights and of the second derivative
    cache: dict = field(default_factory=dict, compare=False)  # what the passes of a training step share

    def weights(self, tensors: list[Tensor]) -> RadialWeights:
        rest = iter(tensors)
        hidden = (None if t is None else next(rest) for t in self.radial[:-2])
        return RadialWeights(*hidden, *self.radial[-2:])

    def _network(self, tensors: list[Tensor]) -> RadialNetwork | None:
        """The networks, the same in all passes of a training step; None where a table stands."""
        if self.table is not None:
            return None
        if "network" in self.cache:
            return self.cache["network"]
        network = RadialNetwork(self.weights(tensors[1:]), self.cutoff, last=False)
        if self.trained:
            self.cache["network"] = network
        return network

    def radial_gradients(self, tensors: list[Tensor]) -> RadialGradients:
        """The networks with their gradients."""
        network = self._network(tensors)
        return RadialGradients(self.weights(tensors[1:]), self.cutoff, last=False, network=network)

    @staticmethod
    def join(sums: Tensor, total: Tensor) -> Tensor:
        """[N, M, h + 4]: the sums of features, the sum of y, and three zeros that keep rows aligned."""
        return torch.cat([sums, F.pad(total.unsqueeze(-1), (0, PAD - 1))], -1)

    @staticmethod
    def split(joined: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the sums [N, M, h] and of the sum of y [N, M] from that of :meth:`join`."""
        return joined[..., :-PAD].contiguous(), joined[..., -PAD]

    def forward(self, tensors: list[Tensor]) -> Tensor:
        vec, network = tensors[0], self._network(tensors)

        def run(chunk: EdgeRun) -> Tensor:  # a function: nothing of a run is there when the next begins
            part = vec[chunk.edges].contiguous()
            distance, y = weighted_harmonics(part, self.lmax, self.cutoff, self.exponent)
            if network is None:
                placed = place_edges(self.table, distance, chunk, self.edges)
                return spline_sum(y, self.table, placed, chunk.row_ptr, self.lmax + 1, PAD)
            hidden, _ = network.forward(distance, *self.edges.elements(chunk))
            total = segment_sum(y, chunk.row_ptr)
            return self.join(harmonic_sum(y, hidden, chunk.row_ptr), total)

        parts = [run(chunk) for chunk in self.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        network = radial = by_weights = None
        if any(n > 0 for n in wanted):
            radial = self.radial_gradients(tensors)
        else:
            network = self._network(tensors)
        vectors = []

        def run(chunk: EdgeRun) -> None:
            nonlocal by_weights
            vec = tensors[0][chunk.edges].detach().contiguous()
            distance, y = weighted_harmonics(vec, self.lmax, self.cutoff, self.exponent)
            if radial is None and network is None:
                placed = place_edges(self.table, distance, chunk, self.edges)
                given = grad[chunk.nodes].contiguous()
                grad_y, slope = spline_backward(y, self.table, placed, chunk.row_ptr, given, self.lmax + 1, PAD)
                vectors.append(weighted_harmonics_backward(grad_y, slope, vec, self.lmax, self.cutoff, self.exponent))
                return
            elements = self.edges.elements(chunk)
            grad_sum, grad_total = self.split(grad[chunk.nodes])
            if radial is None:
                features, middle = network.forward(distance, *elements)
            else:
                features, kept = radial.forward(distance, *elements)
                features = features[0]
            grad_hidden = harmonic_features(y, grad_sum, chunk.row_ptr, torch.empty_like(features))
            grad_y = harmonic_dot(features, grad_sum, chunk.row_ptr) + grad_total.index_select(0, chunk.target)
            if radial is None:
                slope = network.backward(grad_hidden, middle, distance, *elements)
            else:
                slope, _, more = radial.backward(grad_hidden.unsqueeze(0), kept, weights=True)
                by_weights = add_gradients(by_weights, more)
            if 0 in wanted:
                grad_vec = weighted_harmonics_backward(grad_y, slope, vec, self.lmax, self.cutoff, self.exponent)
                vectors.append(grad_vec)

        for chunk in self.chunks if radial is None else self.training_chunks:
            run(chunk)
        found = [t for t in by_weights or () if t is not None]
        return [(vectors[0] if len(vectors) == 1 else torch.cat(vectors)) if n == 0 else found[n - 1] for n in wanted]

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


class _Graph(NamedTuple):
    """Tensors that have no gradient."""

    source: Tensor
    target: Tensor
    row_ptr: Tensor
    species: Tensor
    source_order: Tensor | None
    source_ptr: Tensor | None


def _step(
    vec: Tensor,
    radial: RadialWeights,
    graph: _Graph,
    mode: Mode,
    table: RadialTable | None,
    lmax: int,
    cutoff: float,
    num_basis: int,
    envelope_exponent: int,
    max_run_edges: int | None,
    edge_list: EdgeList | None = None,
) -> _Embedding:
    source, target, row_ptr, species, source_order, source_ptr = graph
    problem = triton_problem(radial.basis.device)
    if problem is not None:
        raise RuntimeError(f"edge_degree_embedding: {problem}; use edge_degree_embedding_reference")
    edges = source.numel()
    check_edge_list(vec, source, target, row_ptr, species)
    check_radial("radial", radial, lmax + 1, num_basis)
    dtype = radial.basis.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"radial.basis: expected float32 or float64, got {dtype}")
    if dtype == torch.float64 and vec.device.type == "cuda":
        raise TypeError("radial.basis: float64 on a GPU goes through edge_degree_embedding_reference")
    named = {f"radial.{n}": t for n, t in radial._asdict().items()}
    check_same_dtype("radial.basis", radial.basis, **named)
    check_same_device("radial.basis", radial.basis, vec=vec, source=source, target=target, **named)
    check_same_device("radial.basis", radial.basis, row_ptr=row_ptr, species=species)
    if edge_list is None:
        edge_list = EdgeList(source, target, row_ptr, species, source_order, source_ptr)
    groups, _, hidden = radial.out.shape

    def runs(budget: int, numbers: int) -> list[EdgeRun]:
        return edge_list.runs(max_run_edges or run_size(edges, numbers, budget))

    per_edge = 3 * (lmax + 1) ** 2 + lmax + 8
    if table is None:
        per_edge += groups * 4 * hidden + 21 * (lmax + 1) ** 2
    else:
        check_table(table, radial.basis, groups * hidden, mode.trained)
    fused = runs(TRAINING_NUMBERS if mode.trained else FUSED_NUMBERS, per_edge)
    second_numbers = groups * 8 * hidden + 3 * num_basis + 6 * (lmax + 1) ** 2
    training = LazyRuns(lambda: runs(SECOND_NUMBERS, second_numbers))
    sizes = lmax, cutoff, num_basis, envelope_exponent
    plan = edge_degree_plan(*sizes, vec, source, target, row_ptr, species, radial)
    return _Embedding(*sizes, fused, edge_list, radial, mode.trained, plan, table, training)


def _make_step(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> _Embedding:
    lmax, num_basis, exponent, max_run, intervals, *known = settings.integers
    cutoff, *table_numbers = settings.numbers
    *graph, out, out_bias, knots, pair_row = with_gaps(index, known[:10])
    radial = RadialWeights(*with_gaps(tensors[1:], known[10:]), out, out_bias)
    table = None if knots is None else RadialTable(knots, pair_row, intervals, *table_numbers)
    graph = _Graph(*graph)
    return _step(tensors[0], radial, graph, mode, table, lmax, cutoff, num_basis, exponent, max_run or None)


def _shape(tensors: list[Tensor], index: list[Tensor], settings: Settings) -> Tensor:
    groups, hidden, _ = tensors[1].shape
    return tensors[0].new_empty(index[2].shape[0] - 1, groups**2, hidden + PAD)


_registered = register("edge_degree_sums", _make_step, _shape)


@torch.compiler.disable()
def _run(vec: Tensor, radial: RadialWeights, *rest) -> Tensor:
    return run_step(_step(vec, radial, *rest), [vec, *there(radial[:-2])])


def edge_degree_embedding(
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
    source_order: Tensor | None = None,
    source_ptr: Tensor | None = None,
    max_run_edges: int | None = None,
    table: RadialTable | None = None,
    edges: EdgeList | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    r"""The function of :func:`edge_degree_embedding_reference` with Triton kernels.

    Arguments as there. source_order, source_ptr, max_run_edges, edges: as in
    :func:`e2former_kernels.equivariant_attention.equivariant_attention`; table likewise, of the networks without their
    last layer.

    Returns [N, (lmax+1)^2, C], float32 (float64 in the interpreter). Differentiable to any order, the same bits every
    time. Raises ValueError, TypeError or RuntimeError for arguments that do not fit or a device without Triton.
    Compiled: see :mod:`e2former_kernels.common.registered`.
    """
    dtype = radial.basis.dtype
    vec, graph = vec.to(dtype), _Graph(source, target, row_ptr, species, source_order, source_ptr)
    if mode.compiled:
        index = (*graph, radial.out.detach(), radial.out_bias.detach(), *(table or (None,) * 5)[:2])
        integers = [lmax, num_basis, envelope_exponent, max_run_edges or 0, 0 if table is None else table.intervals]
        numbers = [cutoff] if table is None else [cutoff, table.scale, table.error]
        settings = Settings([*integers, *flags(index), *flags(radial[:-2])], numbers)
        sums = _registered([vec, *there(radial[:-2])], mode, there(index), settings)
    else:
        sums = _run(vec, radial, graph, mode, table, lmax, cutoff, num_basis, envelope_exponent, max_run_edges, edges)
    # Gradients by the last layer are products of sums over edges: with TF32 they would lose more than products edge by
    # edge, whose roundings average out.
    return so3_linear(sums, last_layer(radial), exact_gradient=True, mode=mode).to(dtype)


def second_derivative(
    step: _Embedding,
    cotangents: list[Tensor | None],
    grad: Tensor,
    tensors: list[Tensor],
    wanted: list[int],
    again: list[int],
) -> list[Tensor] | None:
    """``Step.second`` of the embedding (common/step.py); None where weights are among ``wanted``."""
    if wanted != [0]:
        return None
    vec, vec_dot = tensors[0].contiguous(), cotangents[0].contiguous()
    weights = any(n > 1 for n in again)
    by_grad = torch.empty_like(grad) if 0 in again else None
    by_vec = torch.empty_like(vec) if 1 in again else None
    by_weights: RadialWeights | None = None
    network = step.radial_gradients(tensors)
    options = (step.lmax, step.cutoff, step.exponent)

    def run(chunk: EdgeRun) -> None:  # a function: nothing of a run is there when the next begins
        nonlocal by_weights
        row_ptr = chunk.row_ptr
        edges = vec[chunk.edges], vec_dot[chunk.edges]
        distance, distance_dot, y, y_dot = harmonics_tangent(*edges, *options)
        features, kept = network.forward(distance, *step.edges.elements(chunk), distance_dot)
        if by_grad is not None:
            sums = harmonic_sum(y_dot, features[0], row_ptr).add_(harmonic_sum(y, features[1], row_ptr))
            by_grad[chunk.nodes] = step.join(sums, segment_sum(y_dot, row_ptr))
        if again == [0]:
            return
        by_sum, by_total = step.split(grad[chunk.nodes])
        by_features = torch.empty_like(features)
        for harmonics, part in zip((y_dot, y), by_features, strict=True):
            harmonic_features(harmonics, by_sum, row_ptr, part)
        by_y = by_y_dot = y
        if by_vec is not None:
            by_y = harmonic_dot(features[1], by_sum, row_ptr)
            by_y_dot = harmonic_dot(features[0], by_sum, row_ptr).add_(by_total.index_select(0, chunk.target))
        by_distance, by_distance_dot, more = network.backward(by_features, kept, weights, by_vec is not None)
        by_weights = add_gradients(by_weights, more)
        if by_vec is not None:
            harmonics_second(by_y, by_y_dot, by_distance, by_distance_dot, *edges, *options, out=by_vec[chunk.edges])

    for chunk in step.training_chunks:
        run(chunk)
    found = [by_grad, by_vec, *(t for t in by_weights or () if t is not None)]
    return [found[n] for n in again]
