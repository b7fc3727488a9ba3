"""fairchem's benchmarks of inference and of training with our backbone, at sizes that a CPU takes seconds for."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fairchem.core._cli import get_hydra_config_from_yaml

from e2former_fairchem.runners.benchmarks import SpeedBenchmark, TrainingBenchmark, as_overrides

TINY = (
    "overrides={backbone: e2former_v2_small, max_atoms: 60, backbone.sphere_channels: 8, backbone.num_layers: 1, "
    "backbone.num_heads: 4, backbone.num_radial_basis: 8, backbone.message_order: 1}"
)


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("benchmarks") / "small.pt", cutoff=4.0)


def test_speed(launch: Callable, repo: Path, checkpoint: Path, elsewhere: Path, capsys) -> None:
    config = repo / "configs" / "benchmarks" / "speed.yaml"
    sizes = ("natoms=[4,9]", "timeiters=1", "repeats=1", "job.device_type=CPU")
    launch(config, f"checkpoint={checkpoint}", *sizes)
    (file,) = (elsewhere / "runs" / "benchmarks" / "speed").rglob("benchmark_results.json")
    report = json.loads(file.read_text())
    measured = report["model_to_qps_data"]["small.pt"]
    assert [atoms for atoms, _ in measured] == [4, 9] and report["config"]["device"] == "cpu"
    out = capsys.readouterr().out
    for atoms, speed in measured:
        line = re.search(rf"^ +{atoms} +([\d.]+) +(\S+) +(\S+)$", out, re.MULTILINE)
        milliseconds, per_second, nanoseconds = map(float, line.groups())
        assert nanoseconds == pytest.approx(speed, rel=1e-2)
        assert nanoseconds == pytest.approx(86.4 / milliseconds, rel=1e-2), "1 fs a call"
        assert per_second == pytest.approx(1000 * atoms / milliseconds, rel=1e-2)


def test_training(launch: Callable, repo: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The baseline and the candidate start from the same weights and data; nothing is kept elsewhere."""
    shared = elsewhere / "tmp"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    run = repo / "configs" / "benchmarks" / "training_run.yaml"
    launch(
        repo / "configs" / "benchmarks" / "training.yaml",
        f"training_config={run}",
        TINY,
        "candidate={backbone: {convolution: eaas}}",
        "bf16=false",
        "steps=2",
        "job.device_type=CPU",
    )
    folder = elsewhere / "runs" / "benchmarks" / "training"
    (file,) = folder.rglob("training_benchmark_report.json")
    report = json.loads(file.read_text())
    assert report["baseline_loss"] == pytest.approx(report["candidate_loss"], rel=1e-4), "one function"
    assert report["candidate_loss"] != report["baseline_loss"], "which round differently"
    assert report["steps_per_second"] > 0 and report["baseline_steps_per_second"] > 0
    assert tempfile.tempdir == str(shared) and not list(shared.iterdir()) and not list(folder.rglob("work-*"))
    out = capsys.readouterr().out
    assert re.search(r"steps a second +[\d.]+ +[\d.]+\n", out) and str(file) in out


def test_the_defaults_are_a_training_run_of_our_network(repo: Path, elsewhere: Path) -> None:
    config = repo / "configs" / "benchmarks" / "training_run.yaml"
    overrides = [
        "datasets.data_root_dir=data",
        "bf16=true",
        "max_steps=5",
        "runner.callbacks.0.benchmark_results_path=x",
    ]
    runner = get_hydra_config_from_yaml(str(config), overrides).runner
    unit = runner.train_eval_unit
    assert unit.model.backbone.model == "e2former_fairchem.backbone.E2FormerV2Backbone"
    assert unit.bf16 is True and runner.max_steps == 5 and runner.callbacks[0].benchmark_results_path == "x"
    given = yaml.safe_load((repo / "configs" / "benchmarks" / "training.yaml").read_text())["training_config"]
    assert (repo / given) == config


def test_overrides() -> None:
    changes = {"backbone": {"lmax": 1, "message_order": [0, 1]}, "bf16": True, "heads.x": None, "tasks": "omol"}
    expected = ["backbone.lmax=1", "backbone.message_order=[0, 1]", "bf16=true", "heads.x=null", "tasks=omol"]
    assert as_overrides(changes) == expected


def test_errors(checkpoint: Path, tmp_path: Path) -> None:
    good = {"checkpoint": str(checkpoint), "natoms": [10]}
    for keys, error, message in (
        ({"checkpoint": str(tmp_path / "absent.pt")}, FileNotFoundError, "checkpoint: .* does not exist"),
        ({"checkpoint": None}, ValueError, "checkpoint: .*, got nothing"),
        ({"natoms": []}, ValueError, r"natoms: expected a list of positive integers, got \[\]"),
        ({"natoms": [0]}, ValueError, "natoms: expected a positive integer, got 0"),
        ({"repeats": 1.5}, ValueError, "repeats: expected a positive integer, got 1.5"),
        ({"inference": "slow"}, ValueError, "inference: expected a preset's name"),
    ):
        with pytest.raises(error, match=message):
            SpeedBenchmark(**good | keys)
    with pytest.raises(
        FileNotFoundError, match="training_config: expected a YAML file, got .*; start in the repository's"
    ):
        TrainingBenchmark("configs/nowhere.yaml")
    with pytest.raises(ValueError, match="steps: expected at least 2, .* got 1"):
        TrainingBenchmark(str(checkpoint), steps=1)
