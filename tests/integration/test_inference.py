"""Inference checkpoints, fairchem's predict unit under its presets, Hessians, fine-tuning, compilation."""

from __future__ import annotations

import logging

import pytest
import torch
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit.api.inference import (
    InferenceSettings,
    inference_settings_batch,
    inference_settings_default,
    inference_settings_traineval,
)
from fairchem.core.units.mlip_unit.mlip_unit import initialize_finetuning_model
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit
from fairchem.core.units.mlip_unit.utils import load_inference_model

from e2former_fairchem.backbone import E2FormerV2Backbone

OURS = "e2former_fairchem.heads"
KEYS = ("energy", "forces", "stress")


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "conserving.pt")


@pytest.fixture(scope="module")
def single_precision_batch(batch_of, structures):
    return batch_of(*structures.values(), dtype=torch.float32)


@pytest.mark.parametrize("preset", [inference_settings_batch, inference_settings_traineval])
def test_predict_unit_is_the_model(preset, checkpoint, single_precision_batch, structures) -> None:
    """Energies, forces and stress of a mixed batch, with the normaliser undone, and batch independence."""
    unit = MLIPPredictUnit(str(checkpoint), "cpu", inference_settings=preset())
    found = unit.predict(single_precision_batch.clone())
    model, _ = load_inference_model(str(checkpoint))
    model.eval()
    model.backbone.regress_config.stress = True
    raw = model(single_precision_batch.clone())
    torch.testing.assert_close(found["energy"], raw["energy"]["energy"] * 2.0 + 0.5)
    torch.testing.assert_close(found["forces"], raw["forces"]["forces"] * 2.0)
    torch.testing.assert_close(found["stress"], raw["stress"]["stress"] * 2.0)
    alone = unit.predict(single_precision_batch.get_example(0))
    torch.testing.assert_close(alone["energy"], found["energy"][:1], rtol=1e-6, atol=1e-6)
    assert set(unit.dataset_to_tasks) == {"omol"} and set(unit.tasks) == {"energy", "forces", "stress"}


def test_float64_inference(checkpoint, batch_of, structures) -> None:
    single = MLIPPredictUnit(str(checkpoint), "cpu", inference_settings=InferenceSettings())
    settings = InferenceSettings(base_precision_dtype=torch.float64)
    double = MLIPPredictUnit(str(checkpoint), "cpu", inference_settings=settings)
    coarse = single.predict(batch_of(structures["ethanol"], dtype=torch.float32))
    fine = double.predict(batch_of(structures["ethanol"], dtype=torch.float64))
    assert fine["forces"].dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in double.model.parameters())
    torch.testing.assert_close(fine["forces"].float(), coarse["forces"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(fine["forces"].float(), coarse["forces"])


def test_hessian_on_request(checkpoint, batch_of, structures, caplog) -> None:
    """Under fairchem's default preset, which compiles and would take the vmapped path."""
    settings = inference_settings_default()
    settings.predict_untrained_hessian = {"omol"}
    with caplog.at_level(logging.WARNING):
        unit = MLIPPredictUnit(str(checkpoint), "cpu", inference_settings=settings)
        found = unit.predict(batch_of(structures["water"], dtype=torch.float32))
    assert found["hessian"].shape == (1, 9, 9)
    torch.testing.assert_close(found["hessian"], found["hessian"].mT, rtol=1e-3, atol=1e-3)
    # Moving all atoms together costs nothing: rows sum to zero, and no mean of the energy is added to them.
    scale = float(found["hessian"].abs().max())
    assert scale > 1e-3
    assert float(found["hessian"].reshape(9, 3, 3).sum(1).abs().max()) < 1e-3 * scale
    assert "compile is switched off" in caplog.text and not unit.inference_settings.compile


def test_blocks_are_computed_once(write_checkpoint, tmp_path, caplog, nothing_said) -> None:
    """fairchem's default and its preset `batch` ask for twice, for models that keep edges; so may a checkpoint."""
    path = write_checkpoint(tmp_path / "trained.pt", activation_checkpointing=True)
    with caplog.at_level(logging.INFO):
        for settings in (InferenceSettings(), inference_settings_batch()):
            assert settings.activation_checkpointing
            unit = MLIPPredictUnit(str(path), "cpu", inference_settings=settings)
            assert not unit.inference_settings.activation_checkpointing
            assert not unit.model.module.backbone.config.activation_checkpointing
    assert caplog.text.count("activation_checkpointing is switched off at inference") == 1


def test_energy_head_refuses_derivatives(write_checkpoint, tmp_path, single_precision_batch) -> None:
    heads = {"energy": {"module": f"{OURS}.E2FormerV2EnergyHead"}}
    path = write_checkpoint(tmp_path / "energy.pt", heads=heads, forces=False)
    unit = MLIPPredictUnit(str(path), "cpu", inference_settings=InferenceSettings())
    assert set(unit.predict(single_precision_batch.clone())) == {"energy"}
    unit = MLIPPredictUnit(str(path), "cpu", inference_settings=InferenceSettings(predict_untrained_forces={"omol"}))
    with pytest.raises(ValueError, match=r"predict_untrained_forces: expected an empty set.*got \['omol'\]"):
        unit.predict(single_precision_batch.clone())


def test_direct_model(write_checkpoint, tmp_path, single_precision_batch) -> None:
    heads = {
        "energy": {"module": f"{OURS}.E2FormerV2EnergyHead"},
        "force": {"module": f"{OURS}.E2FormerV2DirectForceHead"},
    }
    path = write_checkpoint(tmp_path / "direct.pt", heads=heads, direct_forces=True)
    unit = MLIPPredictUnit(str(path), "cpu", inference_settings=InferenceSettings())
    found = unit.predict(single_precision_batch.clone())
    assert set(found) == {"energy", "forces"} and not found["forces"].requires_grad


def test_fine_tuning(checkpoint, single_precision_batch) -> None:
    """From the checkpoint's own heads, and with fresh ones on the trained backbone."""
    same = initialize_finetuning_model(str(checkpoint), overrides={"backbone": {"activation_checkpointing": True}})
    assert same.backbone.config.activation_checkpointing and hasattr(same, "finetune_model_full_config")
    fresh = initialize_finetuning_model(
        str(checkpoint),
        heads={"mine": {"module": f"{OURS}.E2FormerV2GradientHead", "prefix": "mine"}},
    )
    for name, weight in same.backbone.state_dict().items():
        assert torch.equal(weight, fresh.backbone.state_dict()[name])
    out = fresh.train()(single_precision_batch.clone())
    out["mine_forces"]["forces"].square().sum().backward()
    assert fresh.backbone.model.blocks[0].attention.value.weight.grad.abs().max() > 0


def test_external_graph_with_too_short_a_radius_is_refused(write_checkpoint, tmp_path, structures, batch_of) -> None:
    settings = InferenceSettings(external_graph_gen=True)
    path = write_checkpoint(tmp_path / "long.pt", cutoff=7.5)
    unit = MLIPPredictUnit(str(path), "cpu", inference_settings=settings)
    with pytest.raises(ValueError, match=r"external graph ends at 6.0 Å, expected at least.* 7.5 Å"):
        unit.predict(batch_of(structures["ethanol"], dtype=torch.float32))


def test_nothing_is_compiled_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = inference_settings_default()
    assert settings.compile
    E2FormerV2Backbone.build_inference_settings(settings)
    assert not settings.compile


def relative_errors(found: list[dict], exact: list[dict]) -> torch.Tensor:
    """Of energy, forces and stress of all structures together."""
    both = [[torch.cat([one[key].cpu().double().flatten() for one in some]) for some in (found, exact)] for key in KEYS]
    return torch.stack([(a - b).norm() / b.norm() for a, b in both])


@pytest.mark.slow
def test_default_settings(device: str, checkpoint, batch_of, structures) -> None:
    """fairchem's default preset, which every calculator takes, for structures of several sizes in turn.

    On a CPU it compiles, once for every number of atoms, and gives the eager model's numbers. On a GPU it does not,
    allows TF32 and rounds rows to float16: errors are at most four times the reference's with TF32 (an H100 gave 2.9),
    replayed or not.
    """
    options = {"overrides": {"backbone": {"kernel_backend": "reference"}}}
    plain = MLIPPredictUnit(str(checkpoint), device, inference_settings=InferenceSettings(tf32=True), **options)
    default = MLIPPredictUnit(str(checkpoint), device, inference_settings=inference_settings_default())
    before = torch._dynamo.config.recompile_limit
    graphs, expected, found = [], [], []
    systems = [structures["ethanol"], structures["slab"], structures["ammonia"], structures["slab"] * (2, 1, 1)]
    if device == "cuda":  # products of a few rows are not in TF32: the reference's error needs a larger one
        systems.append(structures["slab"] * (4, 4, 1))
    try:
        for atoms in systems:
            data = batch_of(atoms, dtype=torch.float32)
            expected.append(plain.predict(data.clone()))
            found.append(default.predict(data.clone()))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        atoms = structures["slab"].copy()
        atoms.calc = FAIRChemCalculator(default, task_name="omol")
        again = []
        for _ in range(5):  # the last one is replayed on a GPU
            atoms.calc.reset()
            again.append({"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()})
        compiled = isinstance(default.model, torch._dynamo.OptimizedModule)
        assert compiled is (device == "cpu") and default.inference_settings.compile is compiled
        if compiled:
            assert graphs[0] > 0, "nothing was compiled"
            assert graphs[1] == graphs[3] == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.config.recompile_limit = before
        torch._dynamo.reset()
    again = [{key: torch.as_tensor(value).view(-1) for key, value in one.items()} for one in again]
    if device == "cpu":
        for atoms, a, b in zip(systems, found, expected, strict=True):
            for key in KEYS:
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=2e-5, msg=f"{atoms} {key}")
        for key, value in again[-1].items():
            torch.testing.assert_close(value.double(), found[1][key].view(-1).double(), rtol=1e-5, atol=1e-5)
        return
    assert default.model.module.backbone.model.execution == "replayed"
    settings = InferenceSettings(base_precision_dtype=torch.float64)
    double = MLIPPredictUnit(str(checkpoint), "cpu", inference_settings=settings)
    exact = [double.predict(batch_of(atoms, dtype=torch.float64)) for atoms in systems]
    replayed = [found[0], found[1] | again[-1], *found[2:]]
    error, error_replayed, budget = (relative_errors(some, exact) for some in (found, replayed, expected))
    assert float(error.norm()) <= 4 * float(budget.norm()), (error, budget)
    assert float(error_replayed.norm()) <= 4 * float(budget.norm()), (error_replayed, budget)
