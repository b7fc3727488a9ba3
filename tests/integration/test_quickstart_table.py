"""The README's quickstart table: from recorded runs alone, and the one that the records in the repository give."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def run(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/quickstart/run.py, which is no package."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks" / "quickstart"))
    return importlib.import_module("run")


def record(network: str, seed: int, energy: float, mirror: float = 100.0) -> dict[str, Any]:
    """One run with made-up numbers; `mirror`: meV between mirror images, where 1 is allowed."""
    errors = {"energy_mev_per_atom": energy, "force_mae": 0.1 + 0.01 * seed, "share_of_zero_forces": 0.1}
    reflection = {"value": mirror, "threshold": 1.0, "unit": "meV", "verdict": "pass" if mirror <= 1 else "fail"}
    return {
        "network": network,
        "seed": seed,
        "overrides": [],
        "device": "CPU",
        "side_by_side": 2,
        "machine": {"processor": "some processor", "commit": "0123456789"},
        "parameters": 1234,
        "epochs": 2.0,
        "steps": 76,
        "metrics": {"omol.val_known": errors, "omol.val_new": errors},
        "training": {"processor_seconds": 200.0 + seed, "wall_seconds": 1.0},
        "checks": {"nve": "pass", "forces": "pass", "reflection": reflection["verdict"], "cutoff": "error"},
        "figures": {"reflection": {"H2O2": {"energy": reflection}, "CHFClBr": {"energy": reflection | {"value": 0.5}}}},
        "molecules": {"val_new": {"HCO q1 m1": errors}},
    }


def write(folder: Path, *records: Mapping[str, Any]) -> Path:
    results = folder / "results"
    results.mkdir(exist_ok=True)
    for found in records:
        (results / f"{found['network']}_seed{found['seed']}.json").write_text(json.dumps(found))
    return folder


def test_mean_and_range(run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ours = [record("e2former_v2", seed, energy) for seed, energy in enumerate((3.0, 5.0, 4.0))]
    theirs = [record("escn_md", seed, energy, 0.5) for seed, energy in enumerate((6.0, 8.0))]
    assert run.main(["--tables", "--output", str(write(tmp_path, *ours, *theirs))]) == 0
    page = (tmp_path / "tables.md").read_text()
    assert page in capsys.readouterr().out
    assert "| known molecules: energy, meV/atom | **4.0 (3.0 to 5.0)** | 7.0 (6.0 to 8.0) |" in page
    assert "| known molecules: forces, eV/Å | 0.110 (0.100 to 0.120) | 0.105 (0.100 to 0.110) |" in page, "they overlap"
    assert "| surface checks passed, of 6 | 2 (2 to 2) | 3 (3 to 3) |" in page
    assert "| `reflection` | 0 of 3; energy 1e+02 meV (limit 1) | 2 of 2 |" in page
    assert "| `cutoff` | 0 of 3; error | 0 of 2; error |" in page and "| `extensivity` | 0 of 3; none |" in page
    assert "| HCO q1 m1 | 4 (3 to 5); 0.11 (0.10 to 0.12) |" in page
    assert "2 and 3 runs each" in page and "some processor" in page and "commit 0123456" in page


def test_runs_add_up_and_others_are_refused(run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Runs that are there are not made again; other overrides neither replace them nor stand in one table with them."""
    folder = write(tmp_path, record("e2former_v2", 0, 3.0), record("escn_md", 0, 6.0))
    assert run.main(["--seeds", "0", "--output", str(folder)]) == 0
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit, match=r"e2former_v2_seed0.json: a run with the overrides \[\] is there already"):
        run.main(["--seeds", "0", "--output", str(folder), "epochs=2"])
    write(tmp_path, record("e2former_v2", 1, 3.0) | {"overrides": ["epochs=2"]})
    assert run.main(["--tables", "--output", str(folder)]) == 1
    assert "overrides: expected the same in all runs" in capsys.readouterr().err
    assert run.main(["--tables", "--output", str(tmp_path / "empty")]) == 1
    assert "expected results, got none" in capsys.readouterr().err


def test_a_run_that_fails_is_told_and_leaves_no_result(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken" / "fairchem" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("print('the reason')\nraise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    write(tmp_path, record("e2former_v2", 0, 3.0))
    assert run.main(["--seeds", "0", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "ended with status 3" in err and "the reason" in err and "to be run again: escn_md_seed0" in err
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["e2former_v2_seed0.json"]


def test_only_what_is_between_markers_changes(run: ModuleType) -> None:
    text = "before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n"
    assert run.replaced(text, "x", "new", "FILE") == text.replace("old", "new")
    for wrong in (text.replace("end", "begin"), text * 2, "<!-- x: end --> <!-- x: begin -->"):
        with pytest.raises(ValueError, match="FILE: expected <!-- x: begin -->"):
            run.replaced(wrong, "x", "new", "FILE")


def test_readme_and_docs_hold_the_recorded_tables(run: ModuleType, repo: Path) -> None:
    results = run.read_results(run.HERE / "results")
    for file, name, kind in (
        ("README.md", "quickstart summary", "summary"),
        ("docs/benchmarks.md", "quickstart table", "errors"),
        ("docs/workflows.md", "quickstart checks", "checks"),
    ):
        text = (repo / file).read_text()
        assert run.replaced(text, name, "", file) != text
        if results:
            table = getattr(run.Tables(results), kind)()
            assert run.replaced(text, name, table, file) == text, "run benchmarks/quickstart/run.py --tables"
