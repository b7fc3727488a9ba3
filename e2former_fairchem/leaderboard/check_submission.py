"""`e2former-fairchem check-submission`: proves a file before it is uploaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from e2former_fairchem.leaderboard.report import Report
from e2former_fairchem.leaderboard.tasks import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's arguments."""
    parser.add_argument("file", type=Path, help="the .npz file of S2EF, or a task's .json.gz")
    parser.add_argument("--task", required=True, choices=["s2ef", *TASKS], help="what the file is for")
    parser.add_argument(
        "--reference",
        type=Path,
        help="what the file must answer: the data set's folder or another .npz (S2EF), the task's input pickle or a "
        "result file of another model or of DFT (tasks)",
    )


def check(file: Path, task: str, reference: Path | None = None) -> Report:
    """Check a submission.

    Args:
        file: the file for the upload.
        task: `s2ef` or one of the seven tasks.
        reference: see `add_arguments`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: `reference` itself cannot be read.
    """
    for what, path in (("file", file), ("--reference", reference)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{what}: expected a file, got {path}, which does not exist")
    report = Report(f"{file} for {task}", complete=reference is not None)
    if task == "s2ef":
        from e2former_fairchem.leaderboard.check_s2ef import check_s2ef

        check_s2ef(report, file, reference)
    else:
        from e2former_fairchem.leaderboard.check_task import check_task

        check_task(report, file, task, reference)
    if reference is None:
        report.note("no --reference: whether the leaderboard's structures are there, and no others, was not checked")
    return report


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 0 where nothing is wrong with what was checked, 1 for a file with problems."""
    report = check(arguments.file, arguments.task, arguments.reference)
    print(report)
    return 1 if report.problems else 0
