"""Equivariant root-mean-square norm over rows and channels."""

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.norm.reference import NORM_EPS, equivariant_rms_norm_reference

__all__ = ["NORM_EPS", "equivariant_rms_norm", "equivariant_rms_norm_reference"]

if triton_installed():
    from e2former_kernels.norm.op import equivariant_rms_norm
else:

    def equivariant_rms_norm(*args, **kwargs):
        """Stands in for the operation where the triton package is missing."""
        raise RuntimeError("equivariant_rms_norm: the triton package is not installed")
