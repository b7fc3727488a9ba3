"""Metrics of a training run: JSON lines and TensorBoard events, through kills and resumes, without an account."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairchem.core.common import distutils
from fairchem.core.units.mlip_unit._metrics import Metrics as Running
from torch import nn

from e2former_fairchem.training.metrics import Metrics, read_metrics

STEPS_AN_EPOCH = 8


class Loss(nn.Module):
    def forward(self, value: torch.Tensor, *, natoms: torch.Tensor) -> torch.Tensor:
        return value


class Run:
    """Calls a callback as torchtnt and fairchem's unit do, with known losses: the step number, and ten times it."""

    def __init__(self, folder: Path, callback: Metrics, step: int = 0) -> None:
        tasks = [SimpleNamespace(name=name, property=name, loss_fn=Loss(), datasets=["d"]) for name in ("e", "f")]
        self.progress = SimpleNamespace(num_steps_completed=0, num_epochs_completed=0, num_steps_completed_in_epoch=0)
        self.unit = SimpleNamespace(
            tasks=tasks,
            model=nn.Identity(),
            train_progress=self.progress,
            optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]),
            last_grad_norm=None,
            running_metrics={"e": {"d.val": {"mae": Running(total=6.0, numel=3)}}},
            job_config=SimpleNamespace(metadata=SimpleNamespace(checkpoint_dir=str(folder / "checkpoints"))),
        )
        loader = SimpleNamespace(dataset=SimpleNamespace(dataset_names=["d.val"]))
        self.state = SimpleNamespace(
            train_state=SimpleNamespace(dataloader=range(STEPS_AN_EPOCH)),
            eval_state=SimpleNamespace(dataloader=loader),
        )
        self.callback = callback
        self._place(step)
        callback.on_train_start(self.state, self.unit)

    def _place(self, step: int) -> None:
        self.progress.num_steps_completed = step
        self.progress.num_epochs_completed, self.progress.num_steps_completed_in_epoch = divmod(step, STEPS_AN_EPOCH)

    def train(self, steps: int, loss: float = 1.0, batch: int = 1) -> None:
        """loss: a factor. batch: pairs of structures."""
        for _ in range(steps):
            self.callback.on_train_step_start(self.state, self.unit)
            step = self.progress.num_steps_completed + 1
            for task, factor in zip(self.unit.tasks, (1.0, 10.0), strict=True):
                task.loss_fn(torch.tensor(loss * factor * step), natoms=torch.tensor([2, 3] * batch))
            self.unit.last_grad_norm = torch.tensor(2.0 * step)
            self._place(step)
            self.callback.on_train_step_end(self.state, self.unit)

    def evaluate(self) -> None:
        self.callback.on_eval_epoch_start(self.state, self.unit)
        for task in self.unit.tasks:  # the evaluation's losses are not the training's
            task.loss_fn(torch.tensor(1e6), natoms=torch.tensor([1]))
        self.callback.on_eval_epoch_end(self.state, self.unit)


def test_killed_and_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    run = Run(tmp_path, Metrics(every_n_steps=5))
    run.train(10)
    run.evaluate()
    run.train(7)  # 15 is written, 16 and 17 are not: then it is killed, in the middle of a line
    file = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(file)] == [5, 10, 10, 15]
    with file.open("a") as handle:
        handle.write('{"kind": "train", "st')

    time.sleep(1.1)  # TensorBoard orders files by the second in their name, and then ...10 before ...9
    resumed = Run(tmp_path, Metrics(every_n_steps=5), step=10)
    resumed.train(12)
    resumed.callback.on_train_end(resumed.state, resumed.unit)
    records = read_metrics(file)
    trained = [r for r in records if r["kind"] == "train"]
    assert [(r["step"], r["steps"]) for r in trained] == [(5, 5), (10, 5), (15, 5), (20, 5), (22, 2)]
    for record in trained:
        first = record["step"] - record["steps"] + 1
        mean = (first + record["step"]) / 2
        assert record["losses"] == {"e": mean, "f": 10 * mean}
        assert record["loss"] == 11 * mean
        assert record["grad_norm"] == 2 * mean
        assert record["epoch"] == record["step"] / STEPS_AN_EPOCH
        assert record["atoms_per_second"] / record["structures_per_second"] == pytest.approx(2.5)
    (evaluated,) = [r for r in records if r["kind"] == "evaluation"]
    assert evaluated["metrics"] == {"d.val": {"e,mae": 2.0}}
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)

    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in shown.Scalars("train/losses/f")] == [5, 10, 15, 20, 22]
    assert [e.step for e in shown.Scalars("val/d.val/e/mae")] == [10]


def train_on_a_rank(folder: Path) -> None:
    """The second rank's losses are five times the first one's, its batches three times as large."""
    rank = distutils.get_rank()
    Run(folder / str(rank), Metrics(every_n_steps=2)).train(2, loss=(1.0, 5.0)[rank], batch=(1, 3)[rank])


def test_a_run_of_two_ranks_averages_losses_and_writes_once(tmp_path: Path, on_two_ranks: Callable) -> None:
    on_two_ranks(train_on_a_rank, tmp_path)
    (record,) = read_metrics(tmp_path / "0" / "metrics.jsonl")
    assert record["losses"] == {"e": 1.5 * 6 / 2, "f": 15.0 * 6 / 2}
    assert record["grad_norm"] == 3.0
    assert record["atoms_per_second"] / record["structures_per_second"] == pytest.approx(2.5)
    assert not (tmp_path / "1").exists()


def test_a_loss_that_diverged_is_json(tmp_path: Path) -> None:
    run = Run(tmp_path, Metrics(every_n_steps=1, tensorboard=False))
    run.unit.tasks[0].loss_fn.register_forward_hook(lambda *_: torch.tensor(float("nan")), prepend=True)
    run.train(1)
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["loss"] is None
    assert record["losses"] == {"e": None, "f": 10.0}


def test_without_tensorboard_the_lines_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Run(tmp_path, Metrics(every_n_steps=1)).train(1)
    assert "no TensorBoard files" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected JSON in line 2, got 'nonsense'"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps: expected an integer of at least 1, got 0"):
        Metrics(every_n_steps=0)


def test_weights_and_biases_beside_it(
    launch: Callable, repo: Path, tiny: Sequence[str], elsewhere: Path, spy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairchem's `job.logger` logs to a (disabled) wandb run, and ours to files: neither needs the other."""
    import wandb
    from fairchem.core.common.logger import WandBSingletonLogger

    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged = spy(WandBSingletonLogger, "log")
    target = "fairchem.core.common.logger.WandBSingletonLogger.init_wandb"
    logger = f"{{_target_: {target}, _partial_: true, entity: e, project: p}}"
    try:
        launch(repo / "configs" / "quickstart.yaml", *tiny, "epochs=1", "batch_size=100", f"job.logger={logger}")
    finally:
        wandb.finish()
        WandBSingletonLogger._instance = None
    assert any("train/loss" in values for (_, values, *_), _ in logged)
    records = read_metrics(next((elsewhere / "runs" / "quickstart").glob("*/metrics.jsonl")))
    assert {r["kind"] for r in records} == {"train", "evaluation"}
