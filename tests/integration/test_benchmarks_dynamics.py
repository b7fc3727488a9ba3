"""The benchmark of one step of dynamics and the peers behind fairchem's predict unit, on a CPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = torch.get_float32_matmul_precision()
    yield importlib.import_module
    torch.set_float32_matmul_precision(before)


def test_shape_of_uma_s(load) -> None:
    """6.3 M parameters, as UMA-S without its experts."""
    predictors = load("predictors")
    unit = predictors.predict_unit(predictors.escn(), "cpu", predictors.settings_of())
    assert 6.3e6 < predictors.parameters_of(unit) < 6.4e6


def test_given_edges(load) -> None:
    """The predict unit takes the edges that the benchmark gives it: all of them is its own list, fewer is not."""
    predictors, workload = load("predictors"), load("workload")
    systems = {n: workload.System(96, n, "cpu") for n in (None, 8)}
    energies = {}
    for given in (False, True):
        unit = predictors.predict_unit(predictors.escn(tiny=True), "cpu", predictors.settings_of(given_edges=given))
        for neighbours, system in systems.items():
            out = unit.predict(predictors.batch_of(system))
            assert out["forces"].shape == (96, 3)
            energies[given, neighbours] = float(out["energy"].detach())
    assert energies[True, None] == pytest.approx(energies[False, None], rel=1e-5)
    assert energies[False, 8] == pytest.approx(energies[False, None], rel=1e-6), "edges that it does not read"
    assert energies[True, 8] != pytest.approx(energies[True, None], rel=1e-5)


def test_steps(load, run_script: Callable[..., None], tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--no-gate", "--atoms", "48", "--steps", "3", "--warmup", "1"]
    run_script(BENCHMARKS / "md_step.py", *arguments, "--output", str(tmp_path))
    rows = json.loads((tmp_path / "md_step.json").read_text())["rows"]
    assert set(rows) == {f"{name}/48" for name in ("paper_32", "paper", "omol25", "omol25_conserving", "escn")}
    for name, row in rows.items():
        assert "error" not in row, (name, row)
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["neighbours_ms"] > 0 and row["model_ms"] > 0 and row["rest_ms"] > 0, "each part was timed"
        assert row["ns_per_day"] == pytest.approx(43.2 / row["ms"])


def test_peers(load, run_script: Callable[..., None], tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--no-gate", "--no-ours", "--peers", "--neighbours", "0", "--atoms", "24"]
    run_script(BENCHMARKS / "model_table.py", *arguments, "--repeats", "1", "--output", str(tmp_path))
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert rows["escn_all/energy_forces/24"]["ms"] > 0 and rows["escn_all/energy_forces/24"]["mode"] == "general"
