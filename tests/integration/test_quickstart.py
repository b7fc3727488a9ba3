"""The README's first command, as a newcomer runs it, and that it learns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_quickstart_learns(repo: Path, launch: Callable, elsewhere: Path, capfd: pytest.CaptureFixture) -> None:
    """A sixth of its epochs, on the CPU: far better than zero forces, and every promise of its output kept.

    The full run's bars are 15 % of the zero-force baseline and 30 meV/atom on val_known.
    """
    launch(repo / "configs" / "quickstart.yaml", "job.device_type=CPU", "epochs=10")
    said = capfd.readouterr().out
    lines = said.splitlines()
    epochs = [line for line in lines if re.match(r"epoch +\d+/10  loss \d", line)]
    assert len(epochs) == 10
    assert all(re.search(r"energy [\d.]+ \+ forces [\d.]+  \[\d+:\d\d, \d+:\d\d left\]$", line) for line in epochs)
    assert [p.name for p in elsewhere.iterdir()] == ["runs"]
    (checkpoint,) = re.findall(r"inference checkpoint: (\S+)", said)
    assert Path(checkpoint) == elsewhere / "runs" / "quickstart" / "inference_ckpt.pt"
    assert Path(checkpoint).is_file()

    lines = next((elsewhere / "runs").rglob("metrics.jsonl")).read_text().splitlines()
    last = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"][-1]
    assert last["epoch"] == 10
    for part, forces, energy in (("omol.val_known", 0.40, 0.250), ("omol.val_new", 0.50, 0.400)):
        share = last["metrics"][part]["omol_forces,mae"] / last["zero_force_mae"][part]
        assert share < forces, (part, share)
        assert last["metrics"][part]["omol_energy,per_atom_mae"] < energy


def test_readme_commands_name_what_exists(repo: Path) -> None:
    readme = (repo / "README.md").read_text()
    assert "pip install -e . && fairchem -c configs/quickstart.yaml" in readme
    assert 'pip install -e ".[test]" && pytest' in readme
    for path in set(re.findall(r"configs/[\w./]+\.yaml", readme)):
        assert (repo / path).is_file(), path
