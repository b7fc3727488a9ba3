"""The `e2former-fairchem` command: one module for each subcommand, listed in COMMANDS.

It lies beside the package, because importing the package registers the network with fairchem, whose import takes
seconds: `--help` and `--version` need neither. A subcommand's module has `add_arguments(parser)` and
`run(arguments) -> int`, the exit status. It is imported only when its subcommand is called.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NoReturn

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
    "info": (
        "e2former_fairchem.commands.info",
        "what a checkpoint is, what it has seen and how well it did",
    ),
    "report": (
        "e2former_fairchem.commands.report",
        "write the report page of a run again, from the numbers in its folder",
    ),
    "run": (
        "e2former_fairchem.commands.run",
        "run a configuration by name, as fairchem -c does, from any folder",
    ),
    "safetensors": (
        "e2former_fairchem.commands.safetensors",
        "convert an inference checkpoint to safetensors, or back",
    ),
    "train": (
        "e2former_fairchem.commands.train",
        "train on your own structures, in any file that ASE reads",
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells more\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status (2 for a wrong command line or file)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:18s}{text}" for name, (_, text) in COMMANDS.items())
    parser = _Parser(
        prog="e2former-fairchem",
        usage="%(prog)s [-h] [--version] [--traceback] COMMAND ...",
        description="E2Former-V2 for fairchem: tools",
        epilog=f"commands:\n{listed}\n\ne2former-fairchem COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('e2former-fairchem')}")
    parser.add_argument(
        "--traceback", action="store_true", help="of errors in files and options, show where they arose"
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    place = next((n for n, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    own = parser.parse_args(arguments[: place + 1])
    path, text = COMMANDS[own.command]
    rest = arguments[place + 1 :]
    module = _by_file(path) if {"-h", "--help"} & set(rest) else _without_library_notes(path)
    subparser = _Parser(prog=f"e2former-fairchem {own.command}", description=text)
    module.add_arguments(subparser)
    parsed = subparser.parse_intermixed_args(rest)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return module.run(parsed)
    except (OSError, ValueError) as err:
        if own.traceback:
            raise
        print(f"e2former-fairchem {own.command}: {err}", file=sys.stderr)
        return 2


def _without_library_notes(path: str) -> ModuleType:
    """A subcommand's module. Warp, which fairchem imports, tells each machine without a GPU so, past Python."""
    said, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        return importlib.import_module(path)
    finally:
        os.dup2(said, 2)
        os.close(said)
        os.close(nothing)


def _by_file(path: str) -> ModuleType:
    """A subcommand's module without the package around it, which is enough for its help."""
    if path in sys.modules:
        return sys.modules[path]
    package, *parts = path.split(".")
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    spec = importlib.util.spec_from_file_location(path, Path(folder, *parts).with_suffix(".py"))
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
