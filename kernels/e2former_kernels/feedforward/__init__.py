"""Gated feed-forward network on spherical tensors."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.feedforward.reference import SIGMOID_SCALE, SILU_SCALE, gated_feedforward_reference

__all__ = ["SIGMOID_SCALE", "SILU_SCALE", "gated_feedforward", "gated_feedforward_reference"]

if triton_installed():
    from e2former_kernels.feedforward.op import gated_feedforward
else:

    def gated_feedforward(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("gated_feedforward: the triton package is not installed")
