"""Elements that training never saw: recorded in training, carried by checkpoints, named or refused outside of them."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit
from fairchem.core.units.mlip_unit.utils import load_inference_model
from torch.utils._python_dispatch import TorchDispatchMode

from e2former_fairchem import validation
from e2former_fairchem.data.make_sample import write_folder
from e2former_fairchem.states import SeenStates
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import (
    initialize_from_checkpoint,
    load_for_evaluation,
    read_checkpoint,
    resume_without_record,
)

RECORD = "backbone.elements_seen"


pytestmark = pytest.mark.usefixtures("nothing_said")


@pytest.fixture
def trained(build, batch_of, structures):
    """A model after a training step on H, C and O, in evaluation mode."""
    model = build().train()
    model(batch_of(structures["ethanol"]))
    return model.eval()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "never saw" in record.getMessage()]


def test_only_training_records(build, batch_of, structures, caplog) -> None:
    model = build()
    assert model.backbone.elements is None
    model(batch_of(structures["crystal"], structures["atom"]))
    assert model.backbone.elements is None and not said(caplog)  # random weights: nothing to hold against them
    model.train()(batch_of(structures["ethanol"]))
    assert model.backbone.elements == ("H", "C", "O")
    model.eval()(batch_of(structures["ammonia"]))
    model.train().requires_grad_(False)(batch_of(structures["crystal"]))  # frozen weights learn nothing
    assert model.backbone.elements == ("H", "C", "O")
    model.requires_grad_(True)(batch_of(structures["slab"]))
    assert model.backbone.elements == ("H", "C", "O", "Cu")


def test_one_warning_by_name_for_each_set(trained, batch_of, structures, caplog) -> None:
    trained(batch_of(structures["ethanol"], structures["water"]))
    assert not said(caplog)
    for _ in range(2):
        trained(batch_of(structures["water"], structures["atom"], structures["slab"]))
    (message,) = said(caplog)
    assert "training never saw He, Cu:" in message and "strict_elements" in message
    trained(batch_of(structures["atom"]))
    assert len(said(caplog)) == 2 and "never saw He:" in said(caplog)[1]


def test_a_refusal_where_asked(build, batch_of, structures) -> None:
    model = build(strict_elements=True).train()
    model(batch_of(structures["ethanol"]))
    model.eval()(batch_of(structures["water"]))
    message = (
        r"expected elements that training has seen \(strict_elements\), H, C, O, got He, Cu: "
        r"atom 3 \(atom 0 of structure 1\) is Cu, atom 4 \(atom 1 of structure 1\) is Cu, atom 6 .* is He; 3 atoms"
    )
    with pytest.raises(ValueError, match=message):
        model(batch_of(structures["water"], structures["slab"], structures["atom"]))
    with pytest.raises(ValueError, match="strict_elements: expected true or false, got 'yes'"):
        build(strict_elements="yes")


def test_the_question_is_part_of_the_one_summary(trained, batch_of, structures, monkeypatch) -> None:
    """Three small operations for elements, and none for states: charges and spins are in what is read anyway."""
    counted: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            counted.append(str(function))
            return function(*arguments, **(keywords or {}))

    data = batch_of(structures["ethanol"], dtype=torch.float32)
    with Count():
        validation.check_batch(data, 118, trained.backbone.elements_seen, SeenStates(frozenset({(0, 1)})))
    launches = sorted({name.split(".")[1] for name in counted} - {"promote_types", "detach", "view"})
    assert launches == ["_to_copy", "aminmax", "cat", "clamp", "index_select", "stack"]
    numbers = {name: sum(f".{name}." in one for one in counted) for name in launches}
    assert numbers == {"_to_copy": 1, "aminmax": 4, "cat": 2, "clamp": 1, "index_select": 1, "stack": 2}


def write(path: Path, source: Path, change: Callable) -> Path:
    checkpoint = read_checkpoint(source)
    for state in (checkpoint.model_state_dict, checkpoint.ema_state_dict):
        change(state)
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint that has seen H, C and O."""
    folder = tmp_path_factory.mktemp("seen")
    seen = torch.zeros(119, dtype=torch.int64)
    seen[[0, 1, 6, 8]] = 1

    def record(state: dict[str, torch.Tensor]) -> None:
        for key in state:
            if key.endswith(RECORD):
                state[key] = seen.clone()

    return write(folder / "seen.pt", write_checkpoint(folder / "plain.pt"), record)


@pytest.fixture(scope="module")
def old(checkpoint: Path) -> Path:
    """The same from before there was a record."""

    def forget(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith(RECORD)]:
            del state[key]

    return write(checkpoint.with_name("old.pt"), checkpoint, forget)


def unit(path: Path, **backbone) -> MLIPPredictUnit:
    settings = InferenceSettings(base_precision_dtype=torch.float64)
    return MLIPPredictUnit(str(path), "cpu", overrides={"backbone": backbone}, inference_settings=settings)


def test_checkpoints_carry_the_record(checkpoint, batch_of, structures, caplog) -> None:
    found = unit(checkpoint)
    found.predict(batch_of(structures["water"]))
    assert not said(caplog)
    found.predict(batch_of(structures["atom"]))
    assert len(said(caplog)) == 1
    assert found.model.module.backbone.elements == ("H", "C", "O")
    assert load_for_evaluation(str(checkpoint)).module.backbone.elements == ("H", "C", "O")
    strict = unit(checkpoint, strict_elements=True)
    with pytest.raises(ValueError, match=r"got He: atom 0 \(atom 0 of structure 0\) is He"):
        strict.predict(batch_of(structures["atom"]))
    assert strict.predict(batch_of(structures["water"]))["energy"].numel() == 1


def test_fine_tuning_adds_to_what_was_seen(checkpoint, batch_of, structures, caplog) -> None:
    model = initialize_from_checkpoint(str(checkpoint)).train()
    model(batch_of(structures["atom"], structures["water"], dtype=torch.float32))
    assert model.backbone.elements == ("H", "He", "C", "O")
    assert model.backbone.elements_seen[[1, 2, 6, 8, 29]].tolist() == [1, 1, 2, 1, 0]
    # Energies of elements that only the first training saw are of its level of theory: said once, or refused.
    model.eval()(batch_of(structures["atom"], dtype=torch.float32))
    assert not caplog.records
    for _ in range(2):
        model(batch_of(structures["ethanol"], structures["slab"], dtype=torch.float32))
    never, before = (record.getMessage() for record in caplog.records)
    assert "training never saw Cu:" in never
    assert "only an earlier training saw C: forces" in before and "energies are of its level of theory" in before
    model.backbone.strict_elements = True
    with pytest.raises(ValueError, match=r"\(strict_elements\), H, He, O, got Cu, C of an earlier training: atom "):
        model(batch_of(structures["ethanol"], structures["slab"], dtype=torch.float32))
    # A third training from there: helium's turns into an earlier one, too.
    model.backbone.begin_anew()
    assert model.backbone.elements_seen[[0, 1, 2, 6, 8, 29]].tolist() == [1, 2, 2, 2, 2, 0]


def test_earlier_checkpoints_load_and_nothing_is_known(old, batch_of, structures, caplog) -> None:
    strictly = load_inference_model(str(old), use_ema=True, strict=True)[0].module
    tuned = initialize_from_checkpoint(str(old))
    for model in (strictly, load_for_evaluation(str(old)).module, tuned):
        assert model.backbone.elements is None
    tuned.train()(batch_of(structures["atom"], dtype=torch.float32))
    assert tuned.backbone.elements is None  # what came before helium stays unknown
    found = unit(old)
    found.predict(batch_of(structures["atom"], structures["slab"]))
    assert not said(caplog)
    with pytest.raises(ValueError, match="strict_elements: expected a checkpoint that knows which elements"):
        unit(old, strict_elements=True).predict(batch_of(structures["water"]))
    heads_only = {k: v for k, v in tuned.state_dict().items() if k.startswith("output_heads.")}
    fresh = copy.deepcopy(tuned)
    fresh.backbone.elements_seen.copy_(torch.arange(119) < 3)
    fresh.load_state_dict(heads_only, strict=False)
    assert fresh.backbone.elements == ("H", "He")  # loading heads says nothing about the backbone


def test_a_run_of_an_earlier_version_resumes(build, batch_of, structures, tmp_path) -> None:
    """Its state holds no record, which torch.distributed.checkpoint refuses to load into a model that has one."""

    def start() -> SimpleNamespace:
        model = build().train()
        model(batch_of(structures["water"]))
        averaged = torch.optim.swa_utils.AveragedModel(model)
        return SimpleNamespace(model=model, ema_model=averaged, lazy_state_location=str(tmp_path))

    def load(run: SimpleNamespace) -> None:
        state = {"model": run.model.state_dict(), "ema": run.ema_model.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
        run.model.load_state_dict(state["model"])
        run.ema_model.load_state_dict(state["ema"])

    first = start()
    state = {"model": first.model.state_dict(), "ema": first.ema_model.state_dict()}
    earlier = {kind: {k: v for k, v in tensors.items() if not k.endswith(RECORD)} for kind, tensors in state.items()}
    dcp.save(earlier, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match=f"Missing key in checkpoint state_dict: .*{RECORD}"):
        load(start())
    resumed = start()
    resume_without_record(resumed)
    load(resumed)
    resumed.model(batch_of(structures["atom"]))
    resumed.ema_model.update_parameters(resumed.model)
    for model in (resumed.model, resumed.ema_model.module):
        assert model.backbone.elements is None and RECORD not in model.state_dict()
    shutil.rmtree(tmp_path)
    dcp.save(state, checkpoint_id=tmp_path)
    resumed = start()
    resume_without_record(resumed)
    load(resumed)
    assert resumed.model.backbone.elements == ("H", "O")


def _worker(rank: int, store: str, model, data, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with torch.no_grad():
        model.backbone(data[rank])
    results.put((rank, model.backbone.elements))
    torch.distributed.destroy_process_group()


def test_workers_hold_the_union(build, batch_of, structures, tmp_path) -> None:
    """Each of two data-parallel workers has seen what either saw, whichever of them writes the checkpoint."""
    head = "e2former_fairchem.heads.E2FormerV2EnergyHead"
    model = build(head, regress_forces=False, regress_stress=False).train()
    data = [batch_of(structures["ethanol"]), batch_of(structures["slab"])]
    context = torch.multiprocessing.get_context("fork")  # imports are there already
    results = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, str(tmp_path / "store"), model, data, results)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        found = dict(results.get(timeout=60) for _ in workers)
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    assert found == {0: ("H", "C", "O", "Cu"), 1: ("H", "C", "O", "Cu")}


def test_validation_sets_are_not_seen(
    launch: Callable, repo: Path, tiny: Sequence[str], elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through fairchem's trainer and its averaged copy: an element of the validation set alone is named, not seen."""
    for part, symbols in (("train", ("CO", "HF", "N2")), ("val", ("CO", "CuH"))):
        molecules = [Atoms(pair, [[0, 0, 0], [0, 0, 1.2]], info={"charge": 0, "spin": 1}) for pair in symbols]
        for n, atoms in enumerate(molecules):
            atoms.info.update(source=f"fake/{part}{n}/q0/m1/0", data_id="fake")
            atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=0 * atoms.positions)
        write_folder(molecules, elsewhere / part)
    saving = (
        "{_target_: e2former_fairchem.training.callbacks.Checkpoints, "
        "checkpoint_every_n_steps: ${checkpoint_every}, export_to: seen.pt}"
    )
    settings = ("dataset=folders", "data_train=train", "data_val=val", "element_references=spice", "epochs=2")
    with caplog.at_level(logging.WARNING):
        launch(repo / "configs" / "quickstart.yaml", *tiny, *settings, f"runner.callbacks=[{saving}]")
    found = load_for_evaluation(str(elsewhere / "seen.pt")).module.backbone
    assert found.elements == ("H", "C", "N", "O", "F")
    card = read_card(read_checkpoint(elsewhere / "seen.pt"))
    assert card["data"] == "train" and "level_of_theory" not in card, "not the sample's, which quickstart.yaml has"
    assert any("never saw Cu:" in message for message in said(caplog))
    assert found.states_seen == SeenStates(frozenset({(0, 1)}))
