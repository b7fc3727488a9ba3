"""``e2former-fairchem info``: what a checkpoint is, what it has seen and how well it did."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a potential that comes with the package (gfn2-small), or an inference checkpoint's file, which is "
        "unpickled: only one that you trust",
    )


def run(args: argparse.Namespace) -> int:
    """Print the card."""
    from e2former_fairchem.training.card import describe
    from e2former_fairchem.training.checkpoint import read_checkpoint

    for line in describe(read_checkpoint(args.checkpoint, key="CHECKPOINT", any_backbone=True)):
        print(line)
    return 0
