"""E2Former-V2, an equivariant attention network for interatomic potentials, as a plugin of fairchem-core.

Importing this package registers the short names ``e2former_v2``, ``e2former_v2_energy_head``,
``e2former_v2_direct_force_head`` and ``e2former_v2_gradient_head`` with fairchem; configurations and checkpoints
written by this package hold full import paths, which need no registration.

``pretrained`` gives the path of a potential that comes with the package (:mod:`e2former_fairchem.weights`).
``train`` trains on one's own structures (:func:`e2former_fairchem.own_data.train.train`); ``EnsembleCalculator``,
``DispersionCalculator`` and ``embeddings`` are in :mod:`e2former_fairchem.calculators`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import e2former_fairchem.backbone
import e2former_fairchem.heads  # noqa: F401  (both register on import)

__all__ = ["DispersionCalculator", "EnsembleCalculator", "__version__", "embeddings", "pretrained", "train"]

#: Name: the module to import when it is asked for.
_LATER = {
    "DispersionCalculator": "calculators",
    "EnsembleCalculator": "calculators",
    "embeddings": "calculators",
    "pretrained": "weights",
    "train": "own_data.train",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"e2former_fairchem.{_LATER[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("e2former-fairchem")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
