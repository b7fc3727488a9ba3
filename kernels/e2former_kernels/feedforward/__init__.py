"""Gated feed-forward network on spherical tensors."""

from e2former_kernels.common.backend import operation
from e2former_kernels.feedforward.reference import SIGMOID_SCALE, SILU_SCALE, gated_feedforward_reference

__all__ = ["SIGMOID_SCALE", "SILU_SCALE", "gated_feedforward", "gated_feedforward_reference"]

gated_feedforward = operation("e2former_kernels.feedforward.op", "gated_feedforward")
