"""Runs of molecular dynamics that test_md.py does here, or in a process of its own that it ends early."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairchem.core import _cli

from e2former_fairchem.md.record import Record
from e2former_fairchem.runners.md import MDRunner


def simulate(checkpoint: Path, folder: Path, structure: str, **changed: Any) -> None:
    """A run in this process, as the command does it."""
    given = {"steps": 24, "log_every": 1, "save_every": 4, "restart_every": 5, "plot": False, "inference": "batch"}
    runner = MDRunner(structure, str(checkpoint), str(folder), **(given | changed))
    runner._job_config = SimpleNamespace(device_type="CPU")
    runner.run()


def signal_self(number: signal.Signals, line: int) -> None:
    """Send this process a signal once the log has a number of lines."""
    write, written = Record.log, []

    def log(record: Record, *arguments: Any) -> None:
        write(record, *arguments)
        written.append(arguments)
        if len(written) == line:
            os.kill(os.getpid(), number)

    Record.log = log


def killed(*arguments: Any, threads: int, line: int, **options: Any) -> None:
    """`simulate` that SIGKILL ends, with as many threads as another process has, so that sums have one order."""
    torch.set_num_threads(threads)
    signal_self(signal.SIGKILL, line)
    simulate(*arguments, **options)


def terminated(config: Path, *overrides: str, line: int, output: Path) -> None:
    """`fairchem -c CONFIG OVERRIDES` that SIGTERM stops, and what it prints."""
    torch.set_num_threads(1)
    signal_self(signal.SIGTERM, line)
    with output.open("w") as file, contextlib.redirect_stdout(file):
        _cli.main(argparse.Namespace(config=str(config)), list(overrides))
