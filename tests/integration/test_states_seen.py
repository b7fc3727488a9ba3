"""Charges and multiplicities that training never saw: from the card into the file, named or refused in evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase import Atoms
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit
from fairchem.core.units.mlip_unit.utils import load_inference_model

from e2former_fairchem.interop.checkpoint_file import export_safetensors, import_safetensors
from e2former_fairchem.states import SeenStates
from e2former_fairchem.training.card import write_card
from e2former_fairchem.training.checkpoint import initialize_from_checkpoint, load_for_evaluation, read_checkpoint
from e2former_fairchem.weights import pretrained

RECORD = "backbone.states_seen"
EARLIER = {"name": "first", "states": [[0, 1], [-2, 1]]}
CARD = {"states": [[0, 1], [-1, 1], [0, 3]], "trained_before": [EARLIER]}


def with_state(atoms: Atoms, charge: int, spin: int) -> Atoms:
    atoms = atoms.copy()
    atoms.info.update(charge=charge, spin=spin)
    return atoms


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if ", multiplicity " in record.getMessage()]


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a card, which has seen H and O."""
    path = write_checkpoint(tmp_path_factory.mktemp("states") / "seen.pt")
    content = read_checkpoint(path)
    for weights in (content.model_state_dict, content.ema_state_dict):
        for key in [key for key in weights if key.endswith("elements_seen")]:
            weights[key] = torch.zeros(119, dtype=torch.int64).index_fill_(0, torch.tensor([0, 1, 8]), 1)
    torch.save(content, path)
    write_card(path, CARD)
    return path


@pytest.fixture(scope="module")
def old(checkpoint: Path) -> Path:
    """The same as an earlier version wrote it: the card alone."""
    content = read_checkpoint(checkpoint)
    for weights in (content.model_state_dict, content.ema_state_dict):
        for key in [key for key in weights if key.endswith(RECORD)]:
            del weights[key]
    torch.save(content, path := checkpoint.with_name("old.pt"))
    return path


def unit(path: Path, **backbone: bool) -> MLIPPredictUnit:
    settings = InferenceSettings(base_precision_dtype=torch.float64)
    return MLIPPredictUnit(str(path), "cpu", overrides={"backbone": backbone}, inference_settings=settings)


def test_from_a_card_and_back() -> None:
    seen = SeenStates.from_card(CARD)
    assert seen == SeenStates(frozenset({(0, 1), (-1, 1), (0, 3)}), frozenset({(-2, 1)}))
    assert seen.rows().tolist() == [[-1, 1, 1], [0, 1, 1], [0, 3, 1], [-2, 1, 2]]
    assert SeenStates.from_rows(seen.rows()) == seen
    for card in ({}, {"states": []}, {"states": [[0, 1]], "trained_before": [{"name": "of an earlier version"}]}):
        assert SeenStates.from_card(card) is None


def test_each_state_is_named_once_by_each_model(checkpoint, batch_of, structures, caplog) -> None:
    water = structures["water"]
    known = batch_of(with_state(water, 0, 1), with_state(water, -1, 1), with_state(water, 0, 3))
    strange = batch_of(with_state(water, 0, 1), with_state(water, 2, 1), with_state(water, -2, 1))
    for _ in range(2):
        found = unit(checkpoint)
        found.predict(known.clone())
        assert not said(caplog)
        for _ in range(2):
            found.predict(strange.clone())
        never, before = said(caplog)
        assert "charge +2, multiplicity 1: not among those of the training (+0 and 1, +0 and 3, -1 and 1)" in never
        assert "strict_elements: true" in never
        assert "charge -2, multiplicity 1: among those of an earlier training only: forces" in before
        found.predict(batch_of(with_state(water, 2, 1), with_state(water, -1, 3)))
        assert len(said(caplog)) == 3 and "charge -1, multiplicity 3: not" in said(caplog)[2]  # -1 and 3 alone are seen
        caplog.clear()


def test_a_refusal_where_asked(checkpoint, old, batch_of, structures) -> None:
    water = structures["water"]
    found = unit(checkpoint, strict_elements=True)
    assert found.predict(batch_of(with_state(water, -1, 1)))["energy"].numel() == 1
    message = (
        r"charge and spin: expected pairs that training has seen \(strict_elements\), \+0 and 1, \+0 and 3, -1 and 1, "
        r"got charge -2, multiplicity 1 of an earlier training \(structure 2\); charge \+2, multiplicity 2 \(struct"
    )
    for _ in range(2):  # also the second time
        with pytest.raises(ValueError, match=message):
            found.predict(batch_of(*(with_state(water, *state) for state in ((0, 1), (2, 2), (-2, 1), (2, 2)))))
    unit(old, strict_elements=True).predict(batch_of(with_state(water, 2, 2)))  # its elements alone are known


def test_files_of_this_and_earlier_versions_load_strictly(checkpoint, old, batch_of, structures, caplog) -> None:
    weights = read_checkpoint(checkpoint).ema_state_dict
    assert [key for key in weights if key.endswith(RECORD)] == [f"module.{RECORD}"]
    for path, known in ((checkpoint, True), (old, False)):
        for averaged in (True, False):
            model, _ = load_inference_model(str(path), use_ema=averaged, strict=True)
            model = model.module if averaged else model
            assert (model.backbone.states_seen == SeenStates.from_card(CARD)) is known
        assert (load_for_evaluation(str(path)).module.backbone.states_seen is not None) is known
        assert not [key for key in model.state_dict() if key.endswith(RECORD)]  # as earlier versions have it
        model.load_state_dict(model.state_dict(), strict=True)
        assert model.backbone.states_seen is None
    unit(old).predict(batch_of(with_state(structures["water"], 7, 2)))
    assert not said(caplog)


def test_safetensors_keep_it(checkpoint, tmp_path) -> None:
    export_safetensors(checkpoint, tmp_path / "seen.safetensors")
    back = import_safetensors(tmp_path / "seen.safetensors", tmp_path / "back.pt")
    assert unit(back).model.module.backbone.states_seen == SeenStates.from_card(CARD)


def test_training_on_says_nothing_of_what_it_has_yet_to_see(checkpoint, batch_of, structures, caplog) -> None:
    """Until the next card; a model that fairchem's own functions load forgets at the first step."""
    ion = batch_of(with_state(structures["water"], 2, 1), dtype=torch.float32)
    tuned = initialize_from_checkpoint(str(checkpoint))
    assert tuned.backbone.states_seen is None and tuned.trained_before == [EARLIER, {"name": "seen", **tuned_from()}]
    loaded, _ = load_inference_model(str(checkpoint))
    loaded.train()(ion.clone())
    for model in (tuned, loaded):
        model.eval()(ion.clone())
    assert not said(caplog)


def tuned_from() -> dict:
    """What the next card has of the checkpoint."""
    return {"states": CARD["states"], "elements": ["H", "O"]}


def test_the_potential_that_comes_with_the_package_knows() -> None:
    card = read_checkpoint(pretrained("gfn2-small")).card
    seen = load_for_evaluation(pretrained("gfn2-small")).module.backbone.states_seen
    assert seen == SeenStates.from_card(card) and (0, 1) in seen.last and (-5, 1) in seen.before
