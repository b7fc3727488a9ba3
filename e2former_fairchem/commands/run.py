"""``e2former-fairchem run``: a run file by name or path, as `fairchem -c` runs it, with less to read."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a run file by name (quickstart, evaluate/pes, ...; without any, they are listed), or a YAML file",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the run file, as for fairchem -c")


def run(args: argparse.Namespace) -> int:
    """Run it, or list the names."""
    from e2former_fairchem.launch import find, launch, quietly, run_files

    if args.name is None:
        print("\n".join(run_files()))
        return 0
    config = find(args.name)
    print(f"fairchem -c {config} {' '.join(args.overrides)}".rstrip(), flush=True)
    with quietly():
        launch(config, args.overrides)
    return 0
