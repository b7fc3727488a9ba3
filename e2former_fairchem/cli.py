"""The `e2former-fairchem` command: one module for each subcommand, listed in COMMANDS.

A subcommand's module has `add_arguments(parser)` and `run(arguments) -> int`, the exit status. It is imported only when
its subcommand is called.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence

#: Subcommand: its module, and one line of help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "check-submission": (
        "e2former_fairchem.leaderboard.check_submission",
        "check a leaderboard file before the upload",
    ),
    "convert-molfm": (
        "e2former_fairchem.commands.convert_molfm",
        "write the authors' (MolFM) weights as a fairchem inference checkpoint",
    ),
    "doctor": (
        "e2former_fairchem.commands.doctor",
        "versions, GPU, which kernels run, and a self-test against the reference",
    ),
    "fit-references": (
        "e2former_fairchem.commands.fit_references",
        "fit element references to a data set",
    ),
    "report": (
        "e2former_fairchem.commands.report",
        "write the report page of a run again, from the numbers in its folder",
    ),
    "safetensors": (
        "e2former_fairchem.commands.safetensors",
        "convert an inference checkpoint to safetensors, or back",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status (2 for a wrong command line or file)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="e2former-fairchem", description="E2Former-V2 for fairchem: tools")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, (path, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if name in arguments[:1]:
            module = importlib.import_module(path)
            module.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return module.run(parsed)
    except (OSError, ValueError) as err:
        print(f"e2former-fairchem {parsed.command}: {err}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
