"""Equivariant root-mean-square norm over rows and channels."""

from e2former_kernels.common.backend import operation
from e2former_kernels.layer_norm.reference import NORM_EPS, equivariant_rms_norm_reference

__all__ = ["NORM_EPS", "equivariant_rms_norm", "equivariant_rms_norm_reference"]

equivariant_rms_norm = operation("e2former_kernels.layer_norm.op", "equivariant_rms_norm")
