"""Forces under ``torch.inference_mode()``: derivatives of the energy need the graph that it switches off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData

__all__ = ["outside_inference_mode"]


def outside_inference_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``forward(self, data, ...)`` of a backbone or head outside inference mode.

    Tensors that were made inside it cannot be part of a graph: those of ``data`` are replaced by copies.
    """

    @functools.wraps(forward)
    def run(self: Any, data: AtomicData, *args: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return forward(self, data, *args)
        with torch.inference_mode(False):
            for key in list(data.keys()):
                value = data[key]
                if isinstance(value, torch.Tensor) and value.is_inference():
                    data[key] = value.clone()
            return forward(self, data, *args)

    return run
