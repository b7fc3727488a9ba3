"""Losses, schedule, samplers, checkpoints and callbacks of `e2former_fairchem.training`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from fairchem.core.modules.loss import L2NormLoss, MAELoss
from omegaconf import OmegaConf
from torch import nn

from e2former_fairchem.training.callbacks import format_metrics, write_atomically
from e2former_fairchem.training.checkpoint import initialize_from_checkpoint, load_for_evaluation, read_checkpoint
from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.training.metrics import read_metrics
from e2former_fairchem.training.sampler import StructureBatchSampler
from e2former_fairchem.training.schedule import warmup_cosine


def test_force_sum_per_system() -> None:
    natoms = torch.tensor([2, 3])
    predicted, target = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])  # a fixed atom
    loss = PerSystemSumLoss(L2NormLoss(), coefficient=2.0)(predicted, target, mask, natoms)
    by_hand = 2.0 * sum((predicted[k] - target[k]).norm() for k in (0, 1, 3, 4)) / 2
    torch.testing.assert_close(loss, by_hand)


def test_force_sum_per_system_counts_the_systems_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP averages the ranks' gradients: with 3 systems here and 5 elsewhere each rank's sum weighs 2/8."""
    monkeypatch.setattr("fairchem.core.common.distutils.all_reduce", lambda n, **_: n + 5)
    monkeypatch.setattr("fairchem.core.common.distutils.get_world_size", lambda: 2)
    natoms = torch.tensor([1, 2, 1])
    predicted, target = torch.zeros(4, 3), torch.eye(4, 3)
    loss = PerSystemSumLoss(L2NormLoss())(predicted, target, torch.ones(4, dtype=torch.bool), natoms)
    assert loss.item() == pytest.approx(3.0 * 2 / 8)


def test_total_energy_loss_of_the_second_stage_is_fairchems() -> None:
    from fairchem.core.modules.loss import DDPMTLoss

    predicted, target = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [1.0]])
    loss = DDPMTLoss(MAELoss())(predicted, target, torch.ones(2, dtype=torch.bool), torch.tensor([2, 9]))
    assert loss.item() == pytest.approx((1 + 4) / 2)


def published_factor(t: int, total: int) -> float:
    """SPEC.md section 10."""
    if t <= 4000:
        return 0.2 + 0.8 * t / 4000
    return 0.01 + 0.495 * (1 + math.cos(math.pi * t / total)) if t < total else 0.01


def test_schedule_is_the_published_one() -> None:
    total = 20_000
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=8e-4)
    scheduler = warmup_cosine(n_iters_per_epoch=17, optimizer=optimizer, warmup_steps=4000, steps=total)
    for t in range(total + 10):
        if t % 499 == 0 or t in (0, 1, 3999, 4000, 4001, total - 1, total, total + 9):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(8e-4 * published_factor(t, total), rel=1e-12), t
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("totals", [{}, {"steps": 5, "epochs": 2}, {"steps": 0}])
def test_schedule_needs_one_total(totals: dict) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_cosine: expected"):
        warmup_cosine(n_iters_per_epoch=3, optimizer=optimizer, warmup_steps=1, **totals)


@pytest.mark.parametrize("size", [7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_structure_once_an_epoch(size: int, ranks: int) -> None:
    samplers = [StructureBatchSampler(range(size), 4, ranks, rank, seed=3) for rank in range(ranks)]
    orders = []
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch_and_start_iteration(epoch, 0)
        batches = [list(sampler) for sampler in samplers]
        assert {len(b) for b in batches} == {len(samplers[0])}  # ranks in step, or DDP would hang
        assert all(0 < len(batch) <= 4 for rank in batches for batch in rank)
        seen = [i for rank in batches for batch in rank for i in batch]
        assert set(seen) == set(range(size))
        # only what fills the last ranks is repeated
        assert len(seen) - size < ranks + 4 * (ranks - 1)
        orders.append(batches)
    assert orders[0] != orders[1] != orders[2]
    sampler = samplers[-1]
    sampler.set_epoch_and_start_iteration(1, 1)
    assert list(sampler) == orders[1][-1][1:]  # a resumed epoch goes on where it stopped


def test_sampler_without_shuffling_keeps_the_order() -> None:
    assert list(StructureBatchSampler(range(5), 2, 1, 0, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("size", "batch", "ranks"), [(0, 4, 1), (1, 4, 2), (5, 0, 1)])
def test_sampler_refuses_what_it_cannot_share_out(size: int, batch: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=r"expected (an integer of )?at least"):
        StructureBatchSampler(range(size), batch, ranks, 0)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    write_atomically(target, lambda name: name.write_text("old"))

    def fail(name: Path) -> None:
        name.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_metrics_in_words() -> None:
    metrics = {"omol_energy,mae": 1.0, "omol_energy,per_atom_mae": 0.0234, "omol_forces,mae": 0.1}
    words = format_metrics(metrics, {"omol_energy": "energy", "omol_forces": "forces"}, zero_force=0.8)
    assert words == "E 23.4 meV/atom, F 0.100 eV/Å (12.5 % of zero forces)"


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inference checkpoint of a tiny direct-force network, with EMA weights that differ from the plain ones."""
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    from e2former_fairchem.hydra_model import E2FormerV2HydraModel

    config = {
        "_target_": "e2former_fairchem.hydra_model.E2FormerV2HydraModel",
        "backbone": {
            "model": "e2former_fairchem.backbone.E2FormerV2Backbone",
            "sphere_channels": 8,
            "num_layers": 1,
            "num_heads": 4,
            "head_dim": 2,
            "num_radial_basis": 8,
            "direct_forces": True,
        },
        "heads": {
            "energy": {"module": "e2former_fairchem.heads.E2FormerV2EnergyHead", "prefix": "omol"},
            "forces": {"module": "e2former_fairchem.heads.E2FormerV2DirectForceHead", "prefix": "omol"},
        },
        "pass_through_head_outputs": True,
    }
    torch.manual_seed(0)
    model = E2FormerV2HydraModel(**{k: v for k, v in config.items() if k != "_target_"})
    weights = model.state_dict()
    averaged = {f"module.module.{k}": v + 1 if v.is_floating_point() else v for k, v in weights.items()}
    path = tmp_path_factory.mktemp("stage1") / "inference_ckpt.pt"
    torch.save(
        MLIPInferenceCheckpoint(
            model_config=OmegaConf.create(config),
            model_state_dict={f"module.{k}": v for k, v in weights.items()},
            ema_state_dict={"n_averaged": torch.tensor(1), **averaged},
            tasks_config=OmegaConf.create([]),
        ),
        path,
    )
    return path


def test_second_stage_keeps_trunk_and_energy_head_of_the_first(stage1: Path) -> None:
    gradient = {"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead", "prefix": "omol"}}
    model = initialize_from_checkpoint(str(stage1), {"direct_forces": False}, gradient)
    given = {k.replace("module.", ""): v for k, v in read_checkpoint(stage1).ema_state_dict.items()}
    state = model.state_dict()
    assert any(k.startswith("output_heads.efs.energy.") for k in state)
    for key, value in state.items():
        torch.testing.assert_close(value, given[key.replace("output_heads.efs.energy", "output_heads.energy.energy")])
    assert model.finetune_model_full_config.backbone.direct_forces is False
    assert list(model.finetune_model_full_config.heads) == ["efs"]


def test_fine_tuning_starts_from_the_averaged_weights(stage1: Path) -> None:
    model = initialize_from_checkpoint(str(stage1))
    evaluated = load_for_evaluation(str(stage1)).module
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, evaluated.state_dict()[key])


def test_weights_that_do_not_fit_are_named(stage1: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: expected .* to fit the backbone's configuration, got \d+"):
        initialize_from_checkpoint(str(stage1), {"sphere_channels": 16})
    with pytest.raises(ValueError, match=r"is missing|is unknown"):
        initialize_from_checkpoint(str(stage1), {"num_layers": 2})


@pytest.fixture
def quick(repo: Path, tiny: Sequence[str]) -> tuple:
    return (repo / "configs" / "quickstart.yaml", *tiny, "epochs=2", "batch_size=50")


def test_resumed_run_equals_an_uninterrupted_one(launch: Callable, quick: tuple, elsewhere: Path) -> None:
    """One epoch of two, then fairchem's resume.yaml for the other: equal weights to the last bit, and one history."""
    launch(*quick, "job.run_dir=straight")
    launch(*quick, "job.run_dir=stopped", "runner.max_epochs=1")
    resume = next((elsewhere / "stopped").glob("*/checkpoints/final/resume.yaml"))
    launch(resume, "runner.max_epochs=2")
    straight = read_checkpoint(elsewhere / "straight" / "inference_ckpt.pt")
    resumed = read_checkpoint(elsewhere / "stopped" / "inference_ckpt.pt")
    for name in ("model_state_dict", "ema_state_dict"):
        given, wanted = getattr(resumed, name), getattr(straight, name)
        assert given.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(given[key], value), key
    files = [next((elsewhere / run).glob("*/metrics.jsonl")) for run in ("straight", "stopped")]
    straight_epochs, resumed_epochs = [[r for r in read_metrics(f) if r["kind"] == "evaluation"] for f in files]
    assert [e["epoch"] for e in resumed_epochs] == [1, 2]
    assert resumed_epochs[-1]["metrics"] == straight_epochs[-1]["metrics"]


def test_train_evaluate_and_fine_tune(
    launch: Callable, quick: tuple, repo: Path, elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    """The README's chain of runs: quickstart, evaluation of its checkpoint, fine-tuning from it."""
    launch(*quick)
    said = capsys.readouterr().out
    assert "epoch   1/2  loss" in said
    assert "omol.val_known: E " in said
    assert "% of zero forces" in said
    checkpoint = elsewhere / "runs" / "quickstart" / "inference_ckpt.pt"
    assert f"inference checkpoint: {checkpoint}" in said
    assert [p.name for p in elsewhere.iterdir()] == ["runs"]  # one folder, nothing else

    launch(repo / "configs" / "evaluate" / "omol25.yaml", "job.device_type=CPU")
    said = capsys.readouterr().out
    assert "omol.val_new, 75 structures: E " in said
    results = json.loads((elsewhere / "runs" / "evaluate" / "results.json").read_text())
    records = read_metrics(next((elsewhere / "runs" / "quickstart").glob("*/metrics.jsonl")))
    trained = next(r["metrics"] for r in reversed(records) if r["kind"] == "evaluation")
    assert results["num_structures"] == {"omol.val_known": 60, "omol.val_new": 75}
    for name, metrics in trained.items():
        for metric in ("omol_energy,per_atom_mae", "omol_forces,mae"):
            assert results["metrics"][name][metric] == pytest.approx(metrics[metric], rel=1e-4)

    before = read_checkpoint(checkpoint)
    launch(
        *quick,
        "model=from_checkpoint",
        "tasks=from_checkpoint",
        *("~energy_coef", "~force_coef", "~normalizer_rmsd", "~element_references"),
        f"checkpoint={checkpoint}",
        "job.run_dir=runs/finetune",
        "lr=0.0",
        "epochs=1",
    )
    after = read_checkpoint(elsewhere / "runs" / "finetune" / "inference_ckpt.pt")
    assert after.tasks_config == before.tasks_config  # written out: the new file does not depend on the first
    for key in ("_target_", "backbone", "heads"):
        assert after.model_config[key] == before.model_config[key]
    for key, value in before.ema_state_dict.items():
        if key != "n_averaged":  # at a learning rate of zero the weights are the averaged ones it started from
            torch.testing.assert_close(after.model_state_dict[key.removeprefix("module.")], value)
