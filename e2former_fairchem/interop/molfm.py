"""Networks published by the authors of E2Former-V2 (MolFM), read into this package's modules."""

from __future__ import annotations

from e2former_fairchem.interop.molfm_checkpoint import ConversionReport, convert_molfm_checkpoint
from e2former_fairchem.interop.molfm_model import build_from_molfm
from e2former_fairchem.interop.molfm_weights import StateDictError

__all__ = ["ConversionReport", "StateDictError", "build_from_molfm", "convert_molfm_checkpoint"]
