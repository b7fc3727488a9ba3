"""``e2former-fairchem report``: the page of a training or an evaluation, made again from the numbers in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="of a run (one that was stopped has its learning curves), of its report, or of several runs: the newest",
    )


def run(args: argparse.Namespace) -> int:
    """Make figures and page."""
    from e2former_fairchem.report.folder import build, find_report

    try:
        page = build(find_report(args.folder.expanduser().absolute()))
    except ImportError as err:
        raise ValueError(f"figures need matplotlib ({err}): pip install matplotlib") from err
    print(f"report: {page}")
    return 0
