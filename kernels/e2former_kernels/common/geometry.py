"""What every layer reads off an edge: its length, the distance basis and the envelope."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from e2former_kernels.common.envelope import bell_envelope, polynomial_envelope
from e2former_kernels.common.radial import gaussian_basis


class EdgeGeometry(NamedTuple):
    """distance: [E], Å. basis: [E, n_b]. envelope: [E]. The same for all layers on one graph."""

    distance: Tensor
    basis: Tensor
    envelope: Tensor


def edge_geometry(
    vec: Tensor,
    cutoff: float,
    num_basis: int,
    envelope_exponent: int,
    bell: tuple[float, float] | None = None,
) -> EdgeGeometry:
    """Lengths, Gaussian basis and envelope of edges (docs/network.md, sections 3.1 and 3.2).

    Differentiable to any order.

    Args:
        vec: [E, 3], r_i - r_j, Å.
        cutoff: end of the basis and of the polynomial envelope, Å.
        num_basis: n_b.
        envelope_exponent: of the polynomial envelope.
        bell: its two radii, Å, where the envelope is a bell.
    """
    distance = vec.square().sum(-1).sqrt()
    if bell is None:
        envelope = polynomial_envelope(distance, cutoff, envelope_exponent)
    else:
        envelope = bell_envelope(distance, *bell)
    return EdgeGeometry(distance, gaussian_basis(distance, cutoff, num_basis), envelope)
