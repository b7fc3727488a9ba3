"""What fairchem's and torch's precision settings allow."""

from __future__ import annotations

import torch
from torch import Tensor


def half_products(x: Tensor) -> bool:
    """Whether products of float32 tensors may be rounded as TF32 does (fairchem's ``tf32``)."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
