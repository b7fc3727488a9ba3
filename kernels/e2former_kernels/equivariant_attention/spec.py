"""What an attention operation computes, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from e2former_kernels.equivariant_attention.score import SCORES

Norm = Literal["smooth", "molfm", "softplus", "sigmoid"]
InverseDistance = Literal["v2", "v1_5"]

# The constant beside the softmax's sum. Both releases have 1e-3. With that in the smooth norm an atom keeps all its
# weight on its last neighbour until the envelope is down to 1e-3 exp(-score): continuous, but a force of 2.9 eV/Å
# within 0.3 Å of the cutoff (quickstart, H pulled off CH3OH). With 1 the weight goes as the envelope does.
MOLFM_CONSTANT = 1e-3
SMOOTH_CONSTANT = 1.0


@dataclass(frozen=True)
class AttentionSpec:
    """Static description of one equivariant attention.

    lmax: highest degree of the node features, M = (lmax+1)^2 rows.
    num_heads: H; channel c of the value belongs to head ``c mod H``.
    score: a name of :data:`e2former_kernels.equivariant_attention.score.SCORES`.
    norm: ``smooth``, ``molfm`` (the authors' softmax), ``softplus``, ``sigmoid``.
    order: of the message: 0 is the value itself, 1 its tensor product with the edge's direction, 2 that with the
        direction's harmonics of degrees 1 and 2.
    inverse_distance: how messages of order 1 and 2 divide by the distance, ``v2``: 1/(d + 1e-8), ``v1_5``:
        1/max(d, 1e-6).
    num_basis, basis_cutoff: Gaussian basis from 0 to basis_cutoff (Å).
    cutoff, envelope_exponent: polynomial envelope (Å, p). bell: (lower, upper) in Å replaces it.

    Made of these: num_rows M; directions B, how many numbers of an edge multiply the value (order 0: none, 1);
    softmax_constant, what stands beside the softmax's sum; norm_number, by which kernels know the norm (``NORM``).
    """

    lmax: int
    num_heads: int
    num_basis: int
    cutoff: float
    score: str = "qk"
    norm: Norm = "smooth"
    order: int = 1
    inverse_distance: InverseDistance = "v1_5"
    envelope_exponent: int = 5
    bell: tuple[float, float] | None = None
    num_rows: int = field(init=False, repr=False, compare=False)
    directions: int = field(init=False, repr=False, compare=False)
    softmax_constant: float = field(init=False, repr=False, compare=False)
    norm_number: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("score", self.score, tuple(SCORES)),
            ("norm", self.norm, get_args(Norm)),
            ("order", self.order, (0, 1, 2)),
            ("inverse_distance", self.inverse_distance, get_args(InverseDistance)),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: expected one of {allowed}, got {value!r}")
        object.__setattr__(self, "num_rows", (self.lmax + 1) ** 2)
        object.__setattr__(self, "directions", (1, 3, 8)[self.order])
        object.__setattr__(self, "softmax_constant", SMOOTH_CONSTANT if self.norm == "smooth" else MOLFM_CONSTANT)
        object.__setattr__(self, "norm_number", get_args(Norm).index(self.norm))
