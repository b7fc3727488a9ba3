"""``e2former-fairchem run``: run files by name, quiet, and mistakes in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from e2former_fairchem.launch import find, run_files
from e2former_fairchem_cli import main


def test_names_are_the_run_files_of_a_clone(repo: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run"]) == 0
    names = capsys.readouterr().out.split()
    assert {"quickstart", "md", "evaluate/pes", "leaderboard/s2ef", "train/omol25_direct"} < set(names)
    for name in names:
        assert (repo / "configs" / f"{name}.yaml").read_text() == find(name).read_text()
        assert "\njob:" in find(name).read_text() or "- job: " in find(name).read_text(), f"{name} is no run"
    assert find(str(run_files()["md"])) == run_files()["md"]


def test_a_run_says_what_it_does_and_nothing_else(
    launch: Callable, tiny: tuple[str, ...], without_figures: None, capfd: pytest.CaptureFixture
) -> None:
    overrides = [*tiny, "epochs=1", "batch_size=300"]
    assert main(["run", "quickstart", *overrides]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    first, *others = out.splitlines()
    assert first.startswith("fairchem -c ") and first.endswith(f"run_files/quickstart.yaml {' '.join(overrides)}")
    assert any("inference checkpoint: " in line for line in others)
    assert len(others) < 15 and not [line for line in others if line.startswith(("INFO", "WARNING"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "expected a file or one of baselines/"),
        (["quickstart", "foo=1"], "Could not override 'foo'"),
        (["quickstart", "dataset=foo"], "Could not find 'dataset/foo' Available options in 'dataset': folders gfn2"),
        (["quickstart", "batch_size=none"], "batch_size: expected an integer of at least 1, got 'none'"),
        (["quickstart", "backbone.num_heads=3", "job.device_type=CPU"], "sphere_channels: expected a multiple of"),
        (
            ["evaluate/omol25", "checkpoint=absent.pt"],
            "checkpoint: expected an inference checkpoint's file or one of gfn2-small",
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, launch: Callable, capfd: pytest.CaptureFixture
) -> None:
    assert main(["run", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("e2former-fairchem run: ") and message in err
    assert err.count("\n") == 1


def test_a_wrong_command_line_is_one_line(capfd: pytest.CaptureFixture) -> None:
    for arguments in (["train", "--size", "huge"], ["run", "quickstart", "--foo"], ["nothing"], []):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        err = capfd.readouterr().err
        assert err.startswith("e2former-fairchem") and err.count("\n") == 1, err
