"""A fairchem model with the authors' configuration and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from fairchem.core.models.base import HydraModel
from torch import Tensor

from e2former_fairchem.data.references import NUM_ELEMENTS
from e2former_fairchem.interop.molfm_config import MolFMConfig, parse_molfm_config
from e2former_fairchem.interop.molfm_weights import translate_state_dict
from e2former_fairchem.interop.references import element_references

BACKBONE = "e2former_fairchem.backbone.E2FormerV2Backbone"
HEADS = "e2former_fairchem.heads"


def molfm_model_config(parsed: MolFMConfig, prefix: str | None = None) -> dict[str, Any]:
    """Keyword arguments of ``HydraModel`` for a MolFM configuration, all by full import path.

    Args:
        parsed: the configuration.
        prefix: outputs are called ``{prefix}_energy`` and ``{prefix}_forces``, as in our own configs.
    """
    backbone = {
        "model": BACKBONE,
        **parsed.backbone,
        "direct_forces": not parsed.conserving,
        "regress_forces": True,
        "regress_stress": False,
    }
    if parsed.conserving:
        heads: dict[str, Any] = {"energy_forces": {"module": f"{HEADS}.E2FormerV2GradientHead"}}
    else:
        heads = {
            "energy": {"module": f"{HEADS}.E2FormerV2EnergyHead"},
            "forces": {"module": f"{HEADS}.E2FormerV2DirectForceHead", "kind": parsed.force_head},
        }
    if prefix is not None:
        for head in heads.values():
            head["prefix"] = prefix
    return {
        "backbone": backbone,
        "heads": heads,
        "pass_through_head_outputs": True,
        "supports_single_atoms": True,
    }


def _elements_seen(head: str) -> list[bool]:
    """By atomic number, whether a head was trained on the element: all where its references do not tell."""
    try:
        return [math.isfinite(value) for value in element_references(head)]
    except ValueError:  # a head without a table
        return [True] * (NUM_ELEMENTS + 1)


def build_from_molfm(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, release: str, head: str = "omol25"
) -> HydraModel:
    """A fairchem model that computes what the authors' network computes, in the default dtype of the moment.

    Args:
        config: the flattened MolFM YAML (``backbone_config``'s keys may be nested or not; ``AutoGradForce`` chooses
            conserving forces, ``with_moe`` the direct force head, ``dataset_name_list`` the heads there are).
        state_dict: the entry ``model`` of a released checkpoint.
        release: ``v2`` or ``v1.5``.
        head: data set whose heads to use.

    Returns:
        A model; ``model(data)`` gives ``{"energy": {"energy": [B]}, "forces": {"forces": [N, 3]}}`` in eV and eV/Å,
        without element references. Which elements the network has seen is known where the head's element references
        tell.

    Raises:
        ValueError: a configuration that is not implemented.
        StateDictError: keys that do not fit.
    """
    parsed = parse_molfm_config(config, release)
    if head not in parsed.datasets:
        raise ValueError(f"head: expected one of {', '.join(parsed.datasets)} (dataset_name_list), got {head!r}")
    model = HydraModel(**molfm_model_config(parsed))
    trunk = model.backbone.model
    tensors = translate_state_dict(
        state_dict,
        trunk.config,
        head=head,
        datasets=parsed.datasets,
        force_head=parsed.force_head,
        conserving=parsed.conserving,
    )
    trunk.load_state_dict(tensors["trunk"])
    model.backbone.elements_seen.copy_(torch.tensor(_elements_seen(head))[: trunk.config.max_num_elements + 1])
    heads = model.output_heads
    if parsed.conserving:
        heads["energy_forces"].energy.load_state_dict(tensors["energy"])
    else:
        heads["energy"].energy.load_state_dict(tensors["energy"])
        heads["forces"].force.load_state_dict(tensors["force"])
    return model
