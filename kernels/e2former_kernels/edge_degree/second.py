r"""Second derivative of the edge-degree embedding with kernels, run by run: what training on forces asks for.

As in ``equivariant_attention/second.py``: the first derivative by vec is J^T grad, and L = <c, J^T grad> = <grad, J c>
with J c the change of the output along the cotangent c. The sums :math:`\sum_e Y_{em} a_{e l(m) c}` change by the sums
of Y' a + Y a' with Y' the change of the harmonics and a' that of the radial features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_kernels.common.plan import EdgeChunk
from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.common.radial_second import add_gradients
from e2former_kernels.edge_degree.second_harmonics_kernel import harmonics_second, harmonics_tangent
from e2former_kernels.edge_degree.sums import harmonic_dot, harmonic_features, harmonic_sum, segment_sum

if TYPE_CHECKING:
    from e2former_kernels.edge_degree.op import _Embedding


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

    def run(chunk: EdgeChunk) -> None:  # a function: nothing of a run is there when the next begins
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
