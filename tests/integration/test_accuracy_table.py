"""benchmarks/accuracy: the table of runs, and what the command line refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def accuracy(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo / "benchmarks" / "quickstart"))  # as it does itself
    spec = importlib.util.spec_from_file_location("accuracy_run", repo / "benchmarks" / "accuracy" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table(accuracy: ModuleType, tmp_path: Path) -> None:
    """Seeds are averaged, other overrides are another row."""
    (tmp_path / "results").mkdir()
    for n, (seed, overrides, energy) in enumerate([(0, [], 1.0), (1, [], 2.0), (0, ["lr=1e-3"], 4.0)]):
        strict = {"energy_rmse_mev": energy, "force_rmse_mev": 10 * energy}
        record = {"set": "acac", "network": "e2former_v2", "seed": seed, "overrides": overrides, "steps": 4500}
        record |= {"seconds": 60.0, "tests": {title: {"strict": strict} for title in ("300 K", "600 K")}}
        (tmp_path / "results" / f"{n}.json").write_text(json.dumps(record))
    text = accuracy.tables(tmp_path)
    same = "1.5 (1.0 to 2.0); 15.0 (10.0 to 20.0)"
    assert f"| E2Former-V2 | 4,500 | 2 | 60 | {same} | {same} |" in text
    assert "| E2Former-V2, `lr=1e-3` | 4,500 | 1 | 60 | 4.0; 40.0 | 4.0; 40.0 |" in text


def test_command_line(accuracy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    found = accuracy.arguments(["acac", "lr=1e-3", "--data", "somewhere"])
    assert found.overrides == ["lr=1e-3"] and found.set == "acac"
    for wrong, message in (
        (["acac"], "expected a set and --data"),
        (["acac", "lr", "--data", "x"], "expected KEY=VALUE"),
    ):
        with pytest.raises(SystemExit):
            accuracy.arguments(wrong)
        assert message in capsys.readouterr().err
