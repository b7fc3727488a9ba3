r"""Edge-degree embedding with Triton kernels.

The last linear layer of the radial networks is the same for all edges, so it leaves the sum: the edges add up
harmonics times hidden features, and one matrix product per degree follows for every atom,
:math:`x_{i l m} = W_l \sum_j y_{jlm} a_{jl} + b_l \sum_j y_{jlm}`, y = envelope times harmonics over the mean degree.

Second derivative: the first one by vec is J^T grad, and L = <c, J^T grad> = <grad, J c> with J c the change of the
output along the cotangent c. The sums :math:`\sum_e Y_{em} a_{e l(m) c}` change by those of Y' a + Y a' with Y' the
change of the harmonics and a' that of the radial features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.call import Call, Change, apply_call
from e2former_kernels.common.checks import check_device, check_edges, check_float, check_radial, check_same
from e2former_kernels.common.chunks import EdgeChunk, EdgeList, Plan
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.common.registered import Settings, flags, register, there, with_gaps
from e2former_kernels.edge_degree import kernels as kernel
from e2former_kernels.edge_degree.reference import PAD, EmbeddingSpec, edge_degree_plan, last_layer
from e2former_kernels.linear.op import so3_linear
from e2former_kernels.radial.network import RadialFeatures, RadialNetwork
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines, check_splines

# Working memory of a chunk of edges, in numbers, as in ``equivariant_attention/op.py``.
FUSED_NUMBERS = 3 << 25
TRAINING_NUMBERS = 5 << 26
SECOND_NUMBERS = 3 << 27


@dataclass(frozen=True)
class _Embedding(Call):
    """One embedding over its chunks of receivers. Result: [N, M, h + 4], see :func:`joined`.

    radial: the structure of the weights (which of them there are). splines: of the networks without their last layer,
    where the weights are frozen. chunks: of value and first derivative; training_chunks: of gradients by weights and of
    the second derivative.
    """

    spec: EmbeddingSpec
    edges: EdgeList
    radial: RadialWeights
    trained: bool
    splines: RadialSplines | None
    chunks: list[EdgeChunk]
    training_chunks: Callable[[], list[EdgeChunk]]
    # what the passes of a training step share: the first layers' splines, a product in float64
    cache: dict = field(default_factory=dict, compare=False)

    def weights(self, tensors: list[Tensor]) -> RadialWeights:
        rest = iter(tensors)
        hidden = (None if t is None else next(rest) for t in self.radial[:-2])
        return RadialWeights(*hidden, *self.radial[-2:])

    def plan(self, tensors: list[Tensor]) -> Plan:
        return edge_degree_plan(self.spec, tensors[0], self.edges, self.weights(tensors[1:]))

    def _features(self, tensors: list[Tensor]) -> RadialFeatures:
        """Of the networks, which are the same in all passes of a training step."""
        network = self.cache.get("network")
        if network is None:
            network = RadialNetwork(self.weights(tensors[1:]), self.spec.envelope.cutoff, last=False)
        if self.trained:
            self.cache["network"] = network
        return RadialFeatures(network)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        vec, radial = tensors[0], None if self.splines is not None else self._features(tensors)

        def of_chunk(chunk: EdgeChunk) -> Tensor:  # a function: nothing of a chunk is there when the next begins
            part = vec[chunk.edges].contiguous()
            distance, y = kernel.weighted_harmonics(part, self.spec)
            if radial is None:
                return kernel.spline_sum(
                    y, self.splines, kernel.place_edges(self.splines, distance, chunk), chunk.row_ptr
                )
            hidden, _ = radial.forward(chunk, part, distance, keep=False)
            total = kernel.segment_sum(y, chunk.row_ptr)
            return kernel.joined(kernel.harmonic_sum(y, hidden[0], chunk.row_ptr), total)

        parts = [of_chunk(chunk) for chunk in self.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        by_vec, weights = tensors[0].new_empty(tensors[0].shape), any(n > 0 for n in wanted)
        radial = self._features(tensors) if weights or self.splines is None else None

        def of_chunk(chunk: EdgeChunk) -> None:
            vec, part = tensors[0][chunk.edges].detach().contiguous(), grad[chunk.nodes]
            distance, y = kernel.weighted_harmonics(vec, self.spec)
            if radial is None:
                placed = kernel.place_edges(self.splines, distance, chunk)
                grad_y, slope = kernel.spline_backward(y, self.splines, placed, chunk.row_ptr, part.contiguous())
            else:
                features, kept = radial.forward(chunk, vec, distance, keep=weights)
                grad_sum, grad_total = kernel.apart(part)
                grad_hidden = torch.empty_like(features)
                kernel.harmonic_features(y, grad_sum, chunk.row_ptr, grad_hidden[0])
                grad_y = kernel.harmonic_dot(features[0], grad_sum, chunk.row_ptr)
                grad_y += grad_total.index_select(0, chunk.target)
                slope, *_ = radial.backward(grad_hidden, kept, weights)
            if 0 in wanted:
                kernel.weighted_harmonics_backward(grad_y, slope, vec, self.spec, by_vec[chunk.edges])

        for chunk in self.training_chunks() if weights else self.chunks:
            of_chunk(chunk)
        found = [by_vec, *(radial.found() if weights else ())]
        return [found[n] for n in wanted]

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        if change.wanted != [0]:
            return None
        grad, (vec_dot,) = change.grad, change.cotangents
        vec, vec_dot, spec = tensors[0].contiguous(), vec_dot.contiguous(), self.spec
        weights = any(n > 1 for n in by)
        by_grad = torch.empty_like(grad) if 0 in by else None
        by_vec = torch.empty_like(vec) if 1 in by else None
        radial = self._features(tensors)

        def of_chunk(chunk: EdgeChunk) -> None:
            edges, row_ptr = (vec[chunk.edges], vec_dot[chunk.edges]), chunk.row_ptr
            distance, distance_dot, y, y_dot = kernel.harmonics_tangent(*edges, spec)
            features, kept = radial.forward(chunk, edges[0], distance, edges[1], distance_dot)
            if by_grad is not None:
                sums = kernel.harmonic_sum(y_dot, features[0], row_ptr)
                sums += kernel.harmonic_sum(y, features[1], row_ptr)
                by_grad[chunk.nodes] = kernel.joined(sums, kernel.segment_sum(y_dot, row_ptr))
            if by == [0]:
                return
            by_sum, by_total = kernel.apart(grad[chunk.nodes])
            by_features = torch.empty_like(features)
            for harmonics, part in zip((y_dot, y), by_features, strict=True):
                kernel.harmonic_features(harmonics, by_sum, row_ptr, part)
            by_y = by_y_dot = y
            if by_vec is not None:
                by_y = kernel.harmonic_dot(features[1], by_sum, row_ptr)
                by_y_dot = kernel.harmonic_dot(features[0], by_sum, row_ptr).add_(
                    by_total.index_select(0, chunk.target)
                )
            by_distance, by_distance_dot, _ = radial.backward(by_features, kept, weights, by_vec is not None)
            if by_vec is not None:
                kernel.harmonics_second(
                    by_y, by_y_dot, by_distance, by_distance_dot, *edges, spec, out=by_vec[chunk.edges]
                )

        for chunk in self.training_chunks():
            of_chunk(chunk)
        found = [by_grad, by_vec, *radial.found()]
        return [found[n] for n in by]


def _call(
    spec: EmbeddingSpec, vec: Tensor, edges: EdgeList, radial: RadialWeights, splines: RadialSplines | None, mode: Mode
) -> _Embedding:
    basis, rows = radial.basis, (spec.lmax + 1) ** 2
    check_device("edge_degree_embedding", basis.device)
    check_edges(vec, edges)
    check_radial("radial", radial, "radial.basis", basis, spec.lmax + 1, spec.num_basis)
    check_same("radial.basis", basis, False, vec=vec)
    check_float("radial.basis", basis)
    if basis.dtype == torch.float64 and vec.device.type == "cuda":
        raise TypeError("radial.basis: float64 on a GPU goes through edge_degree_embedding_reference")
    groups, hidden, _ = radial.hidden.shape
    numbers = 3 * rows + spec.lmax + 8
    if splines is None:
        numbers += groups * 4 * hidden + 21 * rows
    else:
        check_splines(splines, basis, groups * hidden, mode.trained)
    chunks = edges.chunks(numbers, TRAINING_NUMBERS if mode.trained else FUSED_NUMBERS)
    training_chunks = partial(edges.chunks, groups * 8 * hidden + 3 * spec.num_basis + 6 * rows, SECOND_NUMBERS)
    return _Embedding(spec, edges, radial, mode.trained, splines, chunks, training_chunks)


def _make_call(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> _Embedding:
    lmax, num_basis, max_edges, intervals, *known = settings.integers
    numbers, of_splines = settings.numbers, []
    edges = EdgeList.of(index[:6], max_edges)
    out, out_bias, *splines = index[6:]
    radial = RadialWeights(*with_gaps(tensors[1:], known), out, out_bias)
    if splines:
        of_splines, numbers = numbers[:2], numbers[2:]
    splines = RadialSplines(*splines, intervals, *of_splines) if splines else None
    return _call(EmbeddingSpec(lmax, num_basis, Envelope.of(numbers)), tensors[0], edges, radial, splines, mode)


def _shape(tensors: list[Tensor], index: list[Tensor], settings: Settings) -> Tensor:
    groups, hidden, _ = tensors[1].shape
    return tensors[0].new_empty(index[2].shape[0] - 1, groups**2, hidden + PAD)


_registered = register("edge_degree_sums", _make_call, _shape)


def edge_degree_embedding(
    spec: EmbeddingSpec,
    vec: Tensor,
    edges: EdgeList,
    radial: RadialWeights,
    *,
    splines: RadialSplines | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    r"""The function of :func:`edge_degree_embedding_reference` with Triton kernels.

    Arguments as there; splines: splines of the networks without their last layer, as in
    :func:`e2former_kernels.equivariant_attention.equivariant_attention`.

    Returns [N, (lmax+1)^2, C], float32 (float64 in the interpreter). Differentiable to any order, the same bits every
    time. Raises ValueError, TypeError or RuntimeError for arguments that do not fit or a device without Triton.
    Compiled: see :mod:`e2former_kernels.common.registered`.
    """
    dtype = radial.basis.dtype
    vec = vec.to(dtype)
    if mode.compiled:
        index = [*edges.tensors(), radial.out.detach(), radial.out_bias.detach(), *(splines or ())[:2]]
        numbers = [0] if splines is None else [splines.intervals]
        integers = [spec.lmax, spec.num_basis, edges.max_edges or 0, *numbers]
        settings = Settings([*integers, *flags(radial[:-2])], [*(splines or ())[3:], *spec.envelope.numbers])
        sums = _registered([vec, *there(radial[:-2])], mode, index, settings)
    else:
        tensors = [vec, *(t for t in radial[:-2] if t is not None)]
        sums = apply_call(_call(spec, vec, edges, radial, splines, mode), tensors)
    # Gradients by the last layer are products of sums over edges: with TF32 they would lose more than products edge by
    # edge, whose roundings average out.
    return so3_linear(sums, last_layer(radial), exact_gradient=True, mode=mode).to(dtype)
