"""Losses, schedule, samplers, checkpoints and callbacks of `e2former_fairchem.training`."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fairchem.core.common import distutils
from fairchem.core.components.train.train_runner import get_most_recent_viable_checkpoint_path
from fairchem.core.datasets.samplers.max_atom_distributed_sampler import MaxAtomDistributedBatchSampler
from fairchem.core.modules.loss import L2NormLoss, MAELoss
from omegaconf import OmegaConf
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.utils.data import DataLoader
from torchtnt.framework.state import State
from torchtnt.framework.unit import TTrainUnit

from e2former_fairchem.training.callbacks import (
    Checkpoints,
    Progress,
    format_metrics,
    keep_old,
    left_out,
)
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import initialize_from_checkpoint, load_for_evaluation, read_checkpoint
from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.training.metrics import read_metrics
from e2former_fairchem.training.resume import check_state, make_movable
from e2former_fairchem.training.sampler import StructureBatchSampler
from e2former_fairchem.training.schedule import warmup_cosine
from e2former_fairchem.training.signals import StopRequest, end_on_signal
from e2former_fairchem.training.unit import TrainEvalUnit


def test_force_sum_per_system() -> None:
    natoms = torch.tensor([2, 3])
    predicted, target = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])  # a fixed atom
    loss = PerSystemSumLoss(L2NormLoss(), coefficient=2.0)(predicted, target, mask, natoms)
    by_hand = 2.0 * sum((predicted[k] - target[k]).norm() for k in (0, 1, 3, 4)) / 2
    torch.testing.assert_close(loss, by_hand)


def force_sum(systems: tuple[int, int]) -> float:
    """On a rank with so many of the systems: an atom each, which is off by 1."""
    natoms = torch.ones(systems[distutils.get_rank()], dtype=torch.long)
    predicted, target = torch.zeros(len(natoms), 3), torch.tensor([[0.0, 1.0, 0.0]]).repeat(len(natoms), 1)
    return PerSystemSumLoss(L2NormLoss())(predicted, target, natoms.bool(), natoms).item()


def test_force_sum_per_system_counts_the_systems_of_all_ranks(on_two_ranks: Callable) -> None:
    """DDP averages the ranks' gradients: with 3 systems on one and 5 on the other each rank's sum weighs 2/8."""
    assert on_two_ranks(force_sum, (3, 5)) == pytest.approx([3.0 * 2 / 8, 5.0 * 2 / 8])


def test_total_energy_loss_of_the_second_stage_is_fairchems() -> None:
    from fairchem.core.modules.loss import DDPMTLoss

    predicted, target = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [1.0]])
    loss = DDPMTLoss(MAELoss())(predicted, target, torch.ones(2, dtype=torch.bool), torch.tensor([2, 9]))
    assert loss.item() == pytest.approx((1 + 4) / 2)


def published_factor(t: int, total: int) -> float:
    """docs/network.md, equation 15.2."""
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


class Interrupted(Progress):
    """Ctrl-C in step 20."""

    def on_train_step_end(self, state: State, unit: TTrainUnit) -> None:
        super().on_train_step_end(state, unit)
        if unit.train_progress.num_steps_completed == 20:
            os.kill(os.getpid(), signal.SIGINT)


def test_resumed_run_equals_an_uninterrupted_one(
    launch: Callable, quick: tuple, elsewhere: Path, capfd: pytest.CaptureFixture
) -> None:
    """One epoch of two; resumed, and stopped by Ctrl-C in the other; resumed where its folder was moved to: equal
    weights to the last bit, and one history.
    """
    launch(*quick, "job.run_dir=straight")
    launch(*quick, "job.run_dir=stopped", "runner.max_epochs=1")
    resume = next((elsewhere / "stopped").glob("*/checkpoints/final/resume.yaml"))

    with pytest.raises(SystemExit) as ended:
        launch(resume, "runner.max_epochs=2", f"runner.callbacks.0._target_={__name__}.Interrupted")
    assert ended.value.code == 130
    said = capfd.readouterr()
    assert "SIGINT: stopping after this step, with a checkpoint" in said.err
    (resume,) = re.findall(r"stopped by SIGINT after step 20; to resume this run: fairchem -c (\S+)$", said.out, re.M)
    whole = Path(resume).parent
    assert whole.name == "step_20"
    # what SLURM's way through submitit would go on from
    assert get_most_recent_viable_checkpoint_path(str(whole.parent)) == str(whole)

    moved = elsewhere / "another place" / "it's here"
    moved.parent.mkdir()
    (elsewhere / "stopped").rename(moved)
    launch(moved / Path(resume).relative_to(elsewhere / "stopped"))
    assert not (elsewhere / "stopped").exists()
    assert f"report: {moved}" in capfd.readouterr().out
    straight = read_checkpoint(elsewhere / "straight" / "inference_ckpt.pt")
    resumed = read_checkpoint(moved / "inference_ckpt.pt")
    assert (moved / "inference_ckpt.1.pt").is_file()  # of one epoch
    for name in ("model_state_dict", "ema_state_dict"):
        given, wanted = getattr(resumed, name), getattr(straight, name)
        assert given.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(given[key], value), key
    assert read_card(resumed) == read_card(straight)
    assert len(read_card(resumed)["states"]) > 3 and read_card(resumed)["steps"] > 20
    files = [next(run.glob("*/metrics.jsonl")) for run in (elsewhere / "straight", moved)]
    straight_epochs, resumed_epochs = [[r for r in read_metrics(f) if r["kind"] == "evaluation"] for f in files]
    assert [e["epoch"] for e in resumed_epochs] == [1, 2]
    assert resumed_epochs[-1]["metrics"] == straight_epochs[-1]["metrics"]


def test_sigterm_before_the_first_checkpoint(quick: tuple, elsewhere: Path) -> None:
    """A process of its own, as a cluster or `kill` ends it: saved, said how to resume, status 143."""
    config, *overrides = quick
    command = ["-c", "from fairchem.core._cli import main; main()", "-c", str(config), *overrides, "epochs=1000"]
    with subprocess.Popen([sys.executable, *command], cwd=elsewhere, stdout=subprocess.PIPE, text=True) as process:
        before = next(line for line in process.stdout if line.startswith("training "))
        process.send_signal(signal.SIGTERM)
        after = process.stdout.read()
    assert process.returncode == 143, before + after
    (resume,) = re.findall(r"^stopped by SIGTERM after step \d+; to resume this run: fairchem -c (\S+)$", after, re.M)
    assert {path.name for path in Path(resume).parent.iterdir()} >= {".metadata", "inference_ckpt.pt", "resume.yaml"}
    assert not (elsewhere / "runs" / "quickstart" / "inference_ckpt.pt").exists()  # what is there is of a finished run


def fairchems_handler(signum: int, frame: object) -> None:
    raise AssertionError("fairchem's handler ran")


fairchems_handler.__qualname__ = "SlurmSPMDProgram._register_signal_handlers.<locals>.graceful_shutdown"


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_state(folder: str) -> None:
    """Stands for fairchem's writer."""
    Path(folder).mkdir()
    (Path(folder) / "resume.yaml").write_text("job: {run_dir: /run, timestamp_id: now}\nrunner: {}\n")


def test_a_signal_during_the_writing_of_a_checkpoint_waits(tmp_path: Path, handlers: None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, fairchems_handler)

    def save(folder: str) -> None:
        write_state(folder)
        for _ in range(2):  # an impatient user's second one, too
            os.kill(os.getpid(), signal.SIGINT)
            callback._stop._since -= 10
        (Path(folder) / ".metadata").touch()

    callback = Checkpoints(1)
    callback.set_runner_callbacks(save, lambda _: None, str(tmp_path / "checkpoints"))
    callback.save_callback(str(tmp_path / "checkpoints" / "step_1"))
    assert {p.name for p in (tmp_path / "checkpoints" / "step_1").iterdir()} == {"resume.yaml", ".metadata"}
    assert callback._stop.agreed() == signal.SIGINT
    with pytest.raises(SystemExit) as ended:  # nothing is being written any more
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 130


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path: Path, handlers: None) -> None:
    folder = tmp_path / "checkpoints"

    def save(location: str) -> None:
        write_state(location)
        if folder.is_dir():
            raise OSError("disk full")

    callback = Checkpoints(1)
    callback.set_runner_callbacks(save, lambda _: None, str(folder))
    callback.save_callback(str(folder / "step_1"))
    content = (folder / "step_1" / "resume.yaml").read_text()
    for name in ("step_1", "step_2"):
        with pytest.raises(OSError, match="disk full"):
            callback.save_callback(str(folder / name))
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        *("checkpoints", "checkpoints/step_1", "checkpoints/step_1/resume.yaml")
    ]
    assert (folder / "step_1" / "resume.yaml").read_text() == content


def test_only_fairchems_handlers_are_replaced(handlers: None) -> None:
    """Under SLURM the handlers are submitit's, in a notebook the user's."""

    def theirs(signum: int, frame: object) -> None: ...

    signal.signal(signal.SIGTERM, theirs)
    stop = StopRequest()
    stop.install()
    end_on_signal()
    assert not stop.installed
    assert signal.getsignal(signal.SIGTERM) is theirs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_without_checkpoints_end_with_a_signals_status(number: int, handlers: None) -> None:
    signal.signal(number, fairchems_handler)
    end_on_signal()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number


@pytest.fixture
def resumable(tmp_path: Path) -> Path:
    """A resume config whose run's folder and data were in /gone, where it now lies."""
    checkpoint = tmp_path / "run" / "first" / "checkpoints" / "step_3"
    dcp.save({"weights": torch.zeros(3)}, checkpoint_id=checkpoint)
    data = {"dataset_configs": {"omol": {"splits": {"train": {"src": "/gone/data"}}}}}
    config = {
        "job": {"run_dir": "/gone/run", "timestamp_id": "then"},
        "runner": {
            "train_eval_unit": {"job_config": {"run_dir": "/gone/run"}},
            "train_dataloader": {"dataset": data},
            "callbacks": [{"export_to": "/gone/run/inference_ckpt.pt"}, {"other": "/gone/running"}],
        },
    }
    file = checkpoint / "resume.yaml"
    OmegaConf.save(OmegaConf.create(config), file)
    make_movable(file, Path("/gone/run/then/checkpoints/step_3"))
    return file


SRC = "runner.train_dataloader.dataset.dataset_configs.omol.splits.train.src"


def test_a_moved_run_goes_on_where_it_lies(resumable: Path) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    run = resumable.parents[3]
    config = get_hydra_config_from_yaml(str(resumable), [f"{SRC}=/anywhere"])
    assert (config.job.run_dir, config.job.timestamp_id) == (str(run), "first")
    assert config.job.runner_state_path == str(resumable.parent)
    assert config.runner.train_eval_unit.job_config.metadata.checkpoint_dir == str(resumable.parents[1])
    assert config.runner.callbacks[0].export_to == str(run / "inference_ckpt.pt")
    assert config.runner.callbacks[1].other == "/gone/running"
    with pytest.raises(Exception, match=rf"{SRC}: expected a folder .* got /gone/data \(nothing there\)"):
        get_hydra_config_from_yaml(str(resumable), [])


def test_a_resume_config_without_its_checkpoint_says_what_to_give(resumable: Path, tmp_path: Path) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    alone = tmp_path / "resume.yaml"
    alone.write_text(resumable.read_text())
    with pytest.raises(Exception, match=r"job.runner_state_path: expected a checkpoint .*/gone/run/then.*=FOLDER"):
        get_hydra_config_from_yaml(str(alone), [f"{SRC}=/anywhere"])
    given = [f"job.runner_state_path={resumable.parent}", f"job.run_dir={tmp_path}", f"{SRC}=/anywhere"]
    assert get_hydra_config_from_yaml(str(alone), given).job.runner_state_path == str(resumable.parent)

    lonely = tmp_path / "elsewhere" / "step_3"
    lonely.parent.mkdir()
    resumable.parent.rename(lonely)
    with pytest.raises(Exception, match=r"job.run_dir: expected the run's folder.* /gone/run, which does not exist"):
        get_hydra_config_from_yaml(str(lonely / "resume.yaml"), [f"{SRC}=/anywhere"])


def test_a_checkpoint_that_was_copied_in_part(tmp_path: Path) -> None:
    dcp.save({"weights": torch.zeros(1000)}, checkpoint_id=tmp_path)
    check_state(tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    whole = file.read_bytes()
    for content in (whole[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"runner_state_path: expected \d+ bytes in {file}, got {len(content)}"):
            check_state(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"runner_state_path: .* got {tmp_path}/.metadata, which cannot be read"):
        check_state(tmp_path)


def test_a_state_that_is_no_checkpoint(tmp_path: Path) -> None:
    """What resume.yaml files of earlier versions run into when their folder was moved."""
    for location, got in ((tmp_path, "a folder without"), (tmp_path / "absent", "no folder")):
        with pytest.raises(FileNotFoundError, match=rf"runner_state_path: expected .* got {location} \({got}\)"):
            check_state(str(location))


def test_structures_larger_than_a_batch_are_counted() -> None:
    """fairchem's sampler drops them, and logs their number where a quiet run shows no such line."""
    natoms = np.array([2, 3, 9, 4, 8])

    class Sizes(list):
        def get_metadata(self, key: str, indices: Sequence[int]) -> np.ndarray:
            return natoms[indices]

    sampler = MaxAtomDistributedBatchSampler(Sizes(natoms), 7, num_replicas=1, rank=0, seed=0)
    assert left_out(DataLoader(Sizes(natoms), batch_sampler=sampler)) == 2
    assert left_out(DataLoader(Sizes(natoms), batch_size=2)) == 0


def test_an_earlier_runs_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = tmp_path / "pes.json", tmp_path / "pes.md"
    keep_old(first, second)
    assert capsys.readouterr().out == ""
    for n in range(3):
        keep_old(first, second)
        first.write_text(str(n))
        if n != 1:
            second.write_text(str(n))
    names = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert names == {"pes.json": "2", "pes.md": "2", "pes.1.json": "0", "pes.1.md": "0", "pes.2.json": "1"}
    assert f"kept of an earlier run: {tmp_path / 'pes.1.json'}, {tmp_path / 'pes.1.md'}" in capsys.readouterr().out


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
    elements = load_for_evaluation(str(checkpoint)).module.backbone.elements
    assert elements == ("H", "C", "N", "O", "F", "Si", "P", "S", "Cl")

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


class PaddedUnit(TrainEvalUnit):
    """Takes on any device the steps that a GPU takes, without graphs."""

    def on_train_start(self, state: State) -> None:
        super().on_train_start(state)
        self._pad(state.train_state.dataloader, self.model.module, capture=False)


@pytest.mark.slow
def test_steps_padded_by_the_loader(
    repo: Path,
    launch: Callable,
    tiny: Sequence[str],
    fake_omol25: Sequence[str],
    elsewhere: Path,
) -> None:
    """What a GPU trains from, here without graphs: the loader's workers pad; losses of every step are fairchem's."""
    common = (*tiny, *fake_omol25, "dataset=folders", "element_references=spice", "epochs=2", "evaluate_every=2")
    common += ("batch_size=5", "num_workers=1", "runner.callbacks.1.every_n_steps=1")
    launch(repo / "configs" / "quickstart.yaml", *common, "job.run_dir=eager", "runner.train_eval_unit.replay=off")
    ours = f"runner.train_eval_unit._target_={__name__}.PaddedUnit"
    launch(repo / "configs" / "quickstart.yaml", *common, "job.run_dir=padded", ours)
    eager, padded = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for folder in ("eager", "padded")
        for file in (elsewhere / folder).glob("*/metrics.jsonl")
    )
    assert len(eager) == len(padded) >= 10
    for one, other in zip(eager, padded, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        if one["kind"] == "train":
            for key in ("loss", "grad_norm", "lr"):
                assert other[key] == pytest.approx(one[key], rel=1e-3), (one["step"], key)
