"""``e2former-fairchem run``: run files by name, quiet, and mistakes in one line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fairchem.core.common import distutils

from e2former_fairchem.compat import fairchem_main
from e2former_fairchem.launch import _is_news, find, run_files
from e2former_fairchem.validation import symbol
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
        (["broken.yaml"], "while parsing a flow sequence in "),
        (["quickstart", "foo=1"], "run_files/quickstart.yaml; expected backbone, batch_size, card"),
        (["quickstart", "batchsize=3"], "batchsize: no key of "),
        (["quickstart", "batchsize=3"], "run_files/quickstart.yaml; did you mean batch_size?"),
        (["quickstart", "cutoff=3"], "did you mean backbone.cutoff?"),
        (["quickstart", "backbone.cutof=3"], "backbone.cutof: no key of "),
        (["quickstart", "~backbne"], "did you mean backbone?"),
        (["quickstart", "+epoch=3"], "did you mean epochs?"),
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
    arguments: list[str], message: str, launch: Callable, elsewhere: Path, capfd: pytest.CaptureFixture
) -> None:
    (elsewhere / "broken.yaml").write_text("runner: [1")
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


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """`command(CONFIG, OVERRIDES)`: what fairchem's own command does in its process, an error at its end included."""
    monkeypatch.setenv("LOGLEVEL", "WARNING")  # whatever becomes of it, it is undone
    monkeypatch.delenv("LOGLEVEL")
    root = logging.getLogger()
    before = root.level

    def run(config: Path, *overrides: str) -> None:
        monkeypatch.setattr(sys, "excepthook", lambda *_: print("Traceback", file=sys.__stderr__))
        monkeypatch.setattr(sys, "argv", ["/bin/fairchem", "-c", str(config), *overrides])
        try:
            fairchem_main(config, overrides)
        except Exception as err:
            sys.excepthook(type(err), err, err.__traceback__)
        finally:
            if distutils.initialized():
                distutils.cleanup()

    with warnings.catch_warnings():
        yield run
    root.setLevel(before)
    root.removeFilter(_is_news)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("md", ["structure=given.xyz"], "structure: expected a file of structures that ASE reads, got given.xyz: XYZ"),
        ("md", ["structure=absent.xyz"], "structure: expected "),
        ("quickstart", ["batchsize=3"], "batchsize: no key of "),
        ("quickstart", ["batch_size=none"], "batch_size: expected an integer of at least 1, got 'none'"),
        ("quikstart", [], "quikstart.yaml, which does not exist; did you mean "),
    ],
)
def test_fairchems_own_command_ends_in_one_line(
    name: str,
    overrides: list[str],
    message: str,
    command: Callable,
    launch: Callable,
    repo: Path,
    elsewhere: Path,
    capfd,
) -> None:
    """With our run files, of which a clone's folder is a link."""
    (elsewhere / "given.xyz").write_text("3\n\nO 0 0 0\n")
    command(repo / "configs" / f"{name}.yaml", *overrides)
    err = capfd.readouterr().err
    assert err.startswith("fairchem: ") and message in err and err.count("\n") == 1, err


def test_errors_of_other_kinds_keep_their_traceback(
    command: Callable, launch: Callable, repo: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """A bug, of this package too; another package's errors, foreign run files, and whoever asks for tracebacks."""
    md = repo / "configs" / "md.yaml"
    for broken in (lambda *_: int("three"), lambda *_: {}["gone"], lambda *_: symbol(None)):
        monkeypatch.setattr("e2former_fairchem.runners.md._read_structure", lambda s, broken=broken: broken(s))
        command(md, "structure=given.xyz")
        assert "Traceback" in capfd.readouterr().err
    foreign = elsewhere / "foreign.yaml"
    foreign.write_text("runner: {_target_: builtins.int, x: three}\njob: {run_dir: runs}\n")
    command(foreign, "batchsize=3")
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    command(md, "structure=absent.xyz")
    assert "Traceback" in capfd.readouterr().err
