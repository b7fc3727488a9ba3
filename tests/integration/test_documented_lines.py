"""Command lines of README and docs: our commands have those arguments, and runs compose with those keys and data."""

from __future__ import annotations

import importlib
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from e2former_fairchem_cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb"))]


def lines(start: str) -> list[str]:
    """Lines of blocks and between backticks that begin with a command, each once, without the command."""
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in PAGES)
    found = re.findall(rf"(?:^|`|&& |\n|\"){re.escape(start)}((?: [^`\n]+)?)", text)
    return sorted({line.split(" && ")[0].removesuffix('\\n",').strip() for line in found} - {""})


OURS = lines("e2former-fairchem")
#: That of gfn2_small.yaml wants labels that are made first: test_gfn2.py makes them, and trains.
THEIRS = [line for line in lines("fairchem -c") if line.startswith("configs/") and "gfn2" not in line]
#: For the lines that only name a run of ours.
DATA = ("data_train=omol/train_4M", "data_val=omol/val")


@pytest.mark.parametrize("line", OURS)
def test_our_commands_take_their_arguments(line: str) -> None:
    command, *arguments = shlex.split(line.removeprefix("--traceback "))
    if command.startswith("-") or command == "COMMAND":
        return
    parser = ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    if "..." not in arguments and arguments:
        parser.parse_intermixed_args(arguments)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable, fake_omol25: Sequence[str]) -> Path:
    """A folder that has what the lines name."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "omol").mkdir()
    for name, data in zip(("train_4M", "val", "test"), (*fake_omol25, fake_omol25[1]), strict=True):
        (folder / "omol" / name).symlink_to(data.split("=")[1])
    checkpoint = folder / "runs" / "quickstart" / "inference_ckpt.pt"
    checkpoint.parent.mkdir(parents=True)
    write_checkpoint(checkpoint)
    (folder / "runs" / "tutorial").symlink_to(checkpoint.parent)
    (folder / "FILE.pt").symlink_to(checkpoint)
    return folder


@pytest.mark.parametrize("line", THEIRS)
def test_runs_compose(line: str, user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    monkeypatch.chdir(user)
    config, *overrides = shlex.split(line)
    if config.startswith("configs/train/") and not overrides:
        overrides = [*DATA]
    assert "runner" in get_hydra_config_from_yaml(str(ROOT / config), overrides)


def test_there_are_lines() -> None:
    assert len(OURS) > 12 and len(THEIRS) > 20
