"""Gate and head of score ``qk`` on a run of receivers, with the gradients of their weights, and with tangents.

The gates of the other scores (``second_directional.py``) have the same methods.
"""

from __future__ import annotations

from torch import Tensor

from e2former_kernels.common.plan import EdgeChunk
from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.common.radial_kernel import RadialNetwork
from e2former_kernels.common.radial_second import Kept, RadialGradients, add_gradients


class RadialGate:
    """Features [T, e, 1, 2H] of runs, gate and head, from one radial network. T = 2 with tangents, else 1.

    network: the same, where it is made already. weights_found: gradients by the weights there are, added up over runs;
    None as long as none were asked for.
    """

    def __init__(self, weights: RadialWeights, cutoff: float, network: RadialNetwork | None = None) -> None:
        self.network = RadialGradients(weights, cutoff, network=network)
        self.weights_found: tuple[Tensor | None, ...] | None = None

    def forward(
        self,
        chunk: EdgeChunk,
        elements: tuple[Tensor, Tensor],
        vec: Tensor,
        distance: Tensor,
        vec_dot: Tensor | None = None,
        distance_dot: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """Features, with their change along vec_dot where it is given, and what :meth:`backward` takes."""
        return self.network.forward(distance, *elements, distance_dot)

    def backward(
        self, grad: Tensor, kept: Kept, weights: bool, by_vec: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by distance, distance_dot and, for :meth:`add_by_vec`, what else knows of the vectors.

        grad: as the features. weights: whether gradients of the weights are wanted. by_vec: whether the rest is.
        """
        by_distance, by_distance_dot, more = self.network.backward(grad, kept, weights, by_vec)
        self.weights_found = add_gradients(self.weights_found, more)
        return by_distance, by_distance_dot, None

    def found(self) -> list[Tensor]:
        """Gradients by the tensors behind the value, in their order, of all runs."""
        return [t for t in self.weights_found or () if t is not None]
