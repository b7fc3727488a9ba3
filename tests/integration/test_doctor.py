"""`e2former-fairchem doctor`, and the table of subcommands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from e2former_fairchem import cli
from e2former_fairchem.commands import doctor
from e2former_fairchem.execution import EXECUTIONS
from e2former_kernels.common.backend import triton_problem

CPU = torch.device("cpu")


def test_report(tmp_path: Path, capsys) -> None:
    assert cli.main(["doctor", "--molecules", "2", "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["healthy"] and out.rstrip().endswith("healthy")
    assert report["versions"]["torch"] == torch.__version__ and "fairchem-core" in out
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert list(report["executions"]) == list(EXECUTIONS)
    assert all(f"  {name:12s} {words}" in out for name, words in report["executions"].items())
    names = [check["name"] for check in report["checks"]]
    assert "reference, eaas, score qk" in names and "reference, on_the_fly, score qk_dot_scalar" in names
    assert all(0 <= check["force_error"] < 1e-4 and check["milliseconds"] > 0 for check in report["checks"])


@pytest.fixture
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET")
    triton_problem.cache_clear()
    yield
    triton_problem.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu_it_says_why_kernels_do_not_run(without_interpreter, capsys) -> None:
    assert cli.main(["doctor", "--molecules", "1"]) == 0
    out = capsys.readouterr().out
    assert "kernels: reference (PyTorch) with kernel_backend=auto on cpu" in out
    assert "Triton kernels do not run here: Triton needs a CUDA device" in out
    assert "reference, dense, score qk" in out
    assert "  reference    taken by training, inference, inference in float64\n" in out
    assert "  kernels      not taken: weights are on cpu\n" in out
    assert "  frozen       not taken: kernels do not run\n" in out


def test_a_wrong_kernel_is_found(monkeypatch, capsys) -> None:
    original = doctor.Network.forward

    def wrong(self, *inputs):
        energy, forces = original(self, *inputs)
        return energy, forces * (1.001 if forces.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(doctor.Network, "forward", wrong)
    assert cli.main(["doctor", "--molecules", "1"]) == 1
    out = capsys.readouterr().out
    assert "WRONG (more than 0.0001)" in out and out.rstrip().endswith("not healthy")


def test_nan_is_not_ok() -> None:
    assert not doctor.Check("x", float("nan"), 0.0, 1.0).ok


@pytest.mark.gpu
def test_kernels_are_tested_on_a_gpu() -> None:
    taken = doctor.taken_executions(torch.device("cuda"))
    assert taken["kernels"] == "taken by training" and taken["reference"] == "taken by inference in float64"
    assert "taken by inference" in (taken["frozen"], taken["frozen_half"])
    checks = doctor.self_test(torch.device("cuda"), 8, kernels=True)
    assert all(check.ok for check in checks)
    assert {check.name for check in checks} >= {f"triton, on_the_fly, score {score}" for score in doctor.SCORES}


def test_subcommands(capsys) -> None:
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        assert f"e2former-fairchem {name}" in capsys.readouterr().out
    assert cli.main(["doctor", "--molecules", "0"]) == 2
    assert "--molecules: expected at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["safetensors", "absent.safetensors", "-o", "out.pt"]) == 2
    assert "absent.safetensors, which does not exist" in capsys.readouterr().err
