"""The network's configuration: one key, one meaning, checked when it is made.

Every key stands with its default in `configs/backbone/e2former_v2.yaml`, too, where the run files' groups begin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from e2former_kernels.common.envelope import Envelope
from e2former_kernels.equivariant_attention.attention_norm import NORM_OF_KEY
from e2former_kernels.equivariant_attention.message import DIRECTIONS
from e2former_kernels.equivariant_attention.reference import refusal
from e2former_kernels.equivariant_attention.score import SCORES as _SCORES

# Scores and norms are those of the attention.
SCORES = tuple(_SCORES)
ATTENTION_NORMS = tuple(NORM_OF_KEY)
MESSAGE_ORDERS = range(len(DIRECTIONS))
CONVOLUTIONS = ("auto", "on_the_fly", "eaas", "dense")
KERNEL_BACKENDS = ("auto", "reference", "triton")
MAX_LMAX = 4
ATTENTION_SPECIES_WIDTH = 128  # width of the element embeddings that the attention's radial networks read


@dataclass(frozen=True)
class LongRange:
    """The authors' long-range node blocks: ``layers`` order-0 blocks over neighbours in [lower, upper] Å.

    Args:
        layers: how many, at least 1.
        lower: Å.
        upper: Å.
        envelope: ``polynomial`` (steps at ``lower``) or ``bell`` (smooth at both ends).
    """

    layers: int = 2
    lower: float = 0.1
    upper: float = 12.0
    envelope: str = "polynomial"

    @classmethod
    def parse(cls, value: LongRange | Mapping[str, Any] | None) -> LongRange | None:
        if value is None or isinstance(value, cls):
            return value
        unknown = sorted(set(value) - {"layers", "lower", "upper", "envelope"})
        if unknown:
            raise ValueError(f"long_range: unknown keys {unknown}; expected layers, lower, upper, envelope")
        parsed = cls(**value)
        _integer("long_range.layers", parsed.layers, 1)
        if not 0 <= parsed.lower < parsed.upper:
            raise ValueError(f"long_range: expected 0 <= lower < upper (Å), got {parsed.lower} and {parsed.upper}")
        _one_of("long_range.envelope", parsed.envelope, ("polynomial", "bell"))
        return parsed


def _one_of(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


def _integer(key: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{key}: expected an integer {bounds}, got {value!r}")


@dataclass(frozen=True)
class E2FormerV2Config:
    """Configuration of :class:`e2former_fairchem.model.E2FormerV2`. Names and meanings: the backbone's keys.

    Args:
        lmax: highest degree of node features, 1 to 4.
        sphere_channels: C.
        num_layers: blocks.
        num_heads: H, divides C.
        head_dim: S, width of a head's query and key (H * S even).
        num_radial_basis: Gaussians on [0, cutoff].
        radial_width: hidden width of the radial networks (None: min(128, num_radial_basis // 2), the authors').
        value_multiplicity: channels per head after the order-1 contraction, before the output projection (None: C / H).
        edge_layer_norm: layer norms in the edge-degree embedding's radial networks.
        inverse_distance: ``v2`` 1/(d+1e-8), ``v1_5`` 1/max(d,1e-6).
        cutoff: Å.
        score: ``qk``, ``qk_dot``, ``qk_dot_scalar``.
        message_order: 0, 1 or 2, for all layers or one each: the value alone, with the direction, or with its harmonics
            of degrees 1 and 2.
        attention_norm: ``smooth`` or the authors'.
        envelope_exponent: 3 (release v2) or 5 (release v1.5).
        atom_embedding: add the element/charge/spin embedding to the initial scalars.
        reflection_equivariant: O(3) instead of SO(3): drop the cross-product paths.
        power_spectrum: the feed-forward's scalars see the squares of the other degrees.
        divide_charge: what charge and spin add is divided among the atoms of a structure.
        long_range: None or {layers, lower, upper, envelope}.
        convolution: form of the order-1 convolution.
        kernel_backend: who computes it.
        activation_checkpointing: recompute every block in the backward pass.
        cuda_graph: replay repeated evaluations of small systems from CUDA graphs (frozen weights, Triton kernels).
        max_num_elements: highest atomic number.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """

    lmax: int = 2
    sphere_channels: int = 128
    num_layers: int = 4
    num_heads: int = 16
    head_dim: int = 8
    num_radial_basis: int = 128
    radial_width: int | None = None
    value_multiplicity: int | None = None
    edge_layer_norm: bool = True
    inverse_distance: str = "v1_5"
    cutoff: float = 6.0
    score: str = "qk"
    message_order: int | tuple[int, ...] = 1
    attention_norm: str = "smooth"
    envelope_exponent: int = 5
    atom_embedding: bool = True
    reflection_equivariant: bool = False
    power_spectrum: bool = False
    divide_charge: bool = False
    long_range: LongRange | Mapping[str, Any] | None = None
    convolution: str = "auto"
    kernel_backend: str = "auto"
    activation_checkpointing: bool = False
    cuda_graph: bool = True
    max_num_elements: int = 118

    def __post_init__(self) -> None:
        _integer("lmax", self.lmax, 1, MAX_LMAX)
        _integer("sphere_channels", self.sphere_channels, 1)
        _integer("num_layers", self.num_layers, 1)
        _integer("num_heads", self.num_heads, 1)
        _integer("head_dim", self.head_dim, 1)
        _integer("num_radial_basis", self.num_radial_basis, 2)
        _integer("max_num_elements", self.max_num_elements, 1)
        _integer("envelope_exponent", self.envelope_exponent, 1)
        if self.sphere_channels % self.num_heads:
            fitting = [n for n in range(1, self.sphere_channels + 1) if self.sphere_channels % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.num_heads))
            raise ValueError(
                f"sphere_channels: expected a multiple of num_heads = {self.num_heads}, got {self.sphere_channels}; "
                f"num_heads={nearest} divides it"
            )
        if self.num_heads * self.head_dim % 2:
            raise ValueError(f"num_heads * head_dim: expected an even number, got {self.num_heads} * {self.head_dim}")
        for key in ("radial_width", "value_multiplicity"):
            if getattr(self, key) is not None:
                _integer(key, getattr(self, key), 1)
        if isinstance(self.cutoff, bool) or not isinstance(self.cutoff, (int, float)) or not 0 < self.cutoff < math.inf:
            raise ValueError(f"cutoff: expected a positive number of Å, got {self.cutoff!r}")
        _one_of("score", self.score, SCORES)
        _one_of("attention_norm", self.attention_norm, ATTENTION_NORMS)
        _one_of("inverse_distance", self.inverse_distance, ("v2", "v1_5"))
        _one_of("convolution", self.convolution, CONVOLUTIONS)
        _one_of("kernel_backend", self.kernel_backend, KERNEL_BACKENDS)
        orders = self.message_order
        if not isinstance(orders, int):
            orders = tuple(orders)
            object.__setattr__(self, "message_order", orders)
            if len(orders) != self.num_layers:
                raise ValueError(f"message_order: expected {self.num_layers} entries (num_layers), got {len(orders)}")
        for order in self.message_orders:
            if isinstance(order, bool) or order not in MESSAGE_ORDERS:
                raise ValueError(
                    f"message_order: expected 0 to {MESSAGE_ORDERS[-1]} (per layer), got {self.message_order!r}"
                )
            if order > 1 and self.convolution == "eaas":
                known = "auto, on_the_fly or dense"
                raise ValueError(f"convolution: expected {known} with message_order {order}, got 'eaas'")
        for key in (
            "edge_layer_norm",
            "atom_embedding",
            "reflection_equivariant",
            "power_spectrum",
            "divide_charge",
            "activation_checkpointing",
            "cuda_graph",
        ):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}: expected true or false, got {getattr(self, key)!r}")
        object.__setattr__(self, "long_range", LongRange.parse(self.long_range))

    @cached_property
    def envelope(self) -> Envelope:
        """Of the edges within the cutoff."""
        return Envelope(self.cutoff, self.envelope_exponent)

    @cached_property
    def long_range_envelope(self) -> Envelope:
        """Of the edges of the long-range blocks."""
        far = self.long_range
        bell = (far.lower, far.upper) if far.envelope == "bell" else None
        return Envelope(far.upper, self.envelope_exponent, bell)

    @property
    def message_orders(self) -> tuple[int, ...]:
        if isinstance(self.message_order, tuple):
            return self.message_order
        return (self.message_order,) * self.num_layers

    @cached_property
    def norm(self) -> str:
        """The attention norm that ``attention_norm`` means; that of both releases is one."""
        return NORM_OF_KEY[self.attention_norm]

    @cached_property
    def refusal(self) -> str | None:
        """Why kernels do not compute this score and norm; None where they do."""
        return refusal(self.score, self.norm)

    @property
    def hidden_radial_width(self) -> int:
        """Hidden width of the radial networks (docs/network.md, section 3.3)."""
        return min(128, self.num_radial_basis // 2) if self.radial_width is None else self.radial_width
