"""What an inference checkpoint says of itself beside its weights: what it was trained on, and how well it did.

The card is the attribute ``card`` of fairchem's `MLIPInferenceCheckpoint`, which fairchem neither reads nor minds.
Other checkpoints have none. Its entries, each of which may be missing:

========================= ======================================================================
data                      what it was trained on, in words or names of files
level_of_theory           of the labels
licence                   of the weights
started_from              the checkpoint that was fine-tuned
structures, steps         of the training set; of the optimiser
states                    pairs of charge and multiplicity in training batches
validation                errors by data set: energy (eV/atom), forces (eV/Å), stress (eV/Å^3)
versions                  of packages
========================= ======================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from e2former_fairchem.files import replacing
from e2former_fairchem.validation import plain

#: What a config may say of its data.
GIVEN = ("data", "level_of_theory", "licence", "started_from")
#: Property: its metric among fairchem's.
METRICS = {"energy": "per_atom_mae", "forces": "mae", "stress": "mae"}
_UNITS = {"energy": (1000.0, "meV/atom"), "forces": (1000.0, "meV/Å"), "stress": (1000.0, "meV/Å^3")}
_SEEN = "backbone.elements_seen"


def check_given(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of a config's ``card`` that are there.

    Raises:
        ValueError: another entry.
    """
    given = dict(plain(given) or {})
    if strangers := set(given) - set(GIVEN):
        raise ValueError(f"card: expected entries among {', '.join(GIVEN)}, got {', '.join(sorted(strangers))}")
    return {key: value for key, value in given.items() if value is not None}


def versions() -> dict[str, str]:
    """Of this package and those that a checkpoint depends on."""
    return {name: version(name) for name in ("e2former-fairchem", "fairchem-core", "torch")}


def validation_errors(metrics: Mapping[str, Mapping[str, float]], properties: Mapping[str, str]) -> dict[str, dict]:
    """An evaluation's metrics (data set -> `task,metric` -> value) as the card has them.

    properties: of each task.
    """
    found: dict[str, dict[str, float]] = {}
    for name, values in metrics.items():
        for key, value in values.items():
            task, metric = key.rsplit(",", 1)
            if METRICS.get(properties.get(task)) == metric:
                found.setdefault(name, {})[properties[task]] = value
    return found


def read_card(checkpoint: MLIPInferenceCheckpoint) -> dict[str, Any]:
    """The card; empty where there is none."""
    return getattr(checkpoint, "card", {})


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Put a card into the file of an inference checkpoint that was just written."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    content.card = dict(card)
    with replacing(path) as handle:
        torch.save(content, handle)


def describe(checkpoint: MLIPInferenceCheckpoint) -> Iterator[str]:
    """Lines for a reader: the network, its tasks, what it has seen and how well it did."""
    config = plain(checkpoint.model_config)
    backbone, card = config.get("backbone") or {}, read_card(checkpoint)
    weights = checkpoint.ema_state_dict or checkpoint.model_state_dict
    parameters = sum(t.numel() for k, t in weights.items() if torch.is_floating_point(t))
    shape = {"layers": "num_layers", "channels": "sphere_channels", "degree": "lmax", "cutoff": "cutoff"}
    words = [f"{name} {backbone[key]}" for name, key in shape.items() if key in backbone]
    yield f"network: {backbone.get('model', 'unknown')}, {parameters:,} numbers, {', '.join(words)}"
    tasks = plain(checkpoint.tasks_config) or []
    conserving = not backbone.get("direct_forces", True)
    for task in tasks:
        note = " (the energy's gradient)" if task["property"] == "forces" and conserving else ""
        yield f"task: {task['name']}, {task['property']}{note}, data sets {', '.join(task['datasets'])}"
    seen = next((t.tolist() for k, t in weights.items() if k.endswith(_SEEN)), None)
    known = seen is not None and seen[0] and not all(seen)
    yield "elements: " + (
        ", ".join(chemical_symbols[z] for z, there in enumerate(seen) if z and there) if known else "not recorded"
    )
    states = [f"{charge:+d} and {spin}" for charge, spin in sorted(card.get("states", ()))]
    yield "charges and multiplicities: " + (", ".join(states) or "not recorded")
    for key in ("level_of_theory", "data", "structures", "steps", "started_from"):
        value = card.get(key, "not recorded" if key != "started_from" else None)
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else ", ".join(value)
            yield f"{key.replace('_', ' ')}: {text}"
    for name, errors in card.get("validation", {}).items():
        said = (f"{kind} {value * _UNITS[kind][0]:.4g} {_UNITS[kind][1]}" for kind, value in errors.items())
        yield f"errors on {name}: {', '.join(said)}"
    if not card.get("validation"):
        yield "errors on validation data: not recorded"
    made = ", ".join(f"{name} {number}" for name, number in card.get("versions", {}).items())
    yield f"made with: {made or 'not recorded'}"
    yield f"licence: {card.get('licence', 'not recorded')}"
