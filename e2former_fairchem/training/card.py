"""What an inference checkpoint says of itself beside its weights: what it was trained on, and how well it did.

The card is the attribute ``card`` of fairchem's `MLIPInferenceCheckpoint`, which fairchem neither reads nor minds.
Other checkpoints have none. Its entries, each of which may be missing:

========================= ======================================================================
data                      what it was trained on, in words or names of files
level_of_theory           of the labels
licence                   of the weights
started_from              the checkpoint that was fine-tuned
trained_before            trainings that came before the one that the other entries are of, the first one first:
                          ``name`` of the checkpoint, ``elements``, and entries of its card
structures, steps         of the training set; of the optimiser
states                    pairs of charge and multiplicity in batches of the last training
validation                errors by data set: energy (eV/atom), forces (eV/Å), stress (eV/Å^3)
versions                  of packages
========================= ======================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from e2former_fairchem.files import replacing
from e2former_fairchem.states import SeenStates, described
from e2former_fairchem.training.properties import PROPERTIES
from e2former_fairchem.validation import plain

#: What a config may say of its data.
GIVEN = ("data", "level_of_theory", "licence", "started_from")
_SEEN, _STATES = "backbone.elements_seen", "backbone.states_seen"
#: Entries of a card that the cards of checkpoints keep that are trained on from it.
_KEPT = ("level_of_theory", "data", "structures", "states", "licence")


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
            known = PROPERTIES.get(properties.get(task))
            if known is not None and known.metric == metric:
                found.setdefault(name, {})[properties[task]] = value
    return found


def read_card(checkpoint: MLIPInferenceCheckpoint) -> dict[str, Any]:
    """The card; empty where there is none."""
    return getattr(checkpoint, "card", {})


def trainings(checkpoint: MLIPInferenceCheckpoint, name: str) -> list[dict[str, Any]]:
    """A checkpoint's ``trained_before``, with its own training (of this name) behind."""
    card, seen = read_card(checkpoint), _elements(checkpoint)
    last = {"name": name} | {key: card[key] for key in _KEPT if key in card}
    if seen is not None:
        last["elements"] = [chemical_symbols[z] for z in seen[1]]
    return [*card.get("trained_before", ()), last]


def _elements(checkpoint: MLIPInferenceCheckpoint) -> tuple[list[int], list[int]] | None:
    """Atomic numbers that only an earlier training saw, and those of the last one; None where nothing is known."""
    weights = checkpoint.ema_state_dict or checkpoint.model_state_dict
    seen = next((t.tolist() for k, t in weights.items() if k.endswith(_SEEN)), None)
    if seen is None or not seen[0] or all(seen):
        return None
    before, last = ([z for z, value in enumerate(seen) if z and value == kind] for kind in (2, 1))
    return before, last


def _joined(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)


def set_card(checkpoint: MLIPInferenceCheckpoint, card: Mapping[str, Any]) -> None:
    """Give a checkpoint its card, and its weights the card's states: fairchem loads nothing else into a backbone."""
    checkpoint.card = dict(card)
    states = SeenStates.from_card(card)
    if states is None:
        return
    rows = states.rows()
    for weights in filter(None, (checkpoint.model_state_dict, checkpoint.ema_state_dict)):
        for key in [key for key in weights if key.endswith(_SEEN)]:
            weights[key.removesuffix(_SEEN) + _STATES] = rows


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Put a card into the file of an inference checkpoint that was just written."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    set_card(content, card)
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
    before, last = _elements(checkpoint) or ([], [])
    yield "elements: " + (_joined(last) or "not recorded")
    yield "charges and multiplicities: " + (_states(card) or "not recorded")
    for key in ("level_of_theory", "data", "structures", "steps", "started_from"):
        value = card.get(key, "not recorded" if key != "started_from" else None)
        if value is not None:
            yield f"{key.replace('_', ' ')}: {_text(value)}"
    for training in card.get("trained_before", ()):
        facts = [training["name"]]
        facts += [_text(training[key]) for key in ("level_of_theory", "data") if training.get(key)]
        facts += [f"{training['structures']:,} structures"] if "structures" in training else []
        facts += [f"licence {training['licence']}"] if training.get("licence") else []
        yield f"trained before: {', '.join(facts)}"
        yield f"    with elements: {', '.join(training.get('elements', ())) or 'not recorded'}"
        yield f"    with charges and multiplicities: {_states(training) or 'not recorded'}"
    if before:
        yield (
            f"elements of earlier trainings only: {_joined(before)}; forces rest on those, energies are of their level "
            "of theory"
        )
    for name, errors in card.get("validation", {}).items():
        known = ((kind, value, PROPERTIES[kind]) for kind, value in errors.items())
        said = (f"{kind} {value * of.factor:.4g} {of.unit}" for kind, value, of in known)
        yield f"errors on {name}: {', '.join(said)}"
    if not card.get("validation"):
        yield "errors on validation data: not recorded"
    made = ", ".join(f"{name} {number}" for name, number in card.get("versions", {}).items())
    yield f"made with: {made or 'not recorded'}"
    yield f"licence: {card.get('licence', 'not recorded')}"


def _states(card: Mapping[str, Any]) -> str:
    return described(sorted(card.get("states", ())))


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else ", ".join(value)
