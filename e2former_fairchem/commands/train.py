"""``e2former-fairchem train``: a potential of one's own structures, from files to the table of errors."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="FILE | KEY=VALUE",
        help="files with structures, energies (eV) and forces (eV/Å) that ASE reads; keys of the run's file, as in "
        "epochs=100 or backbone.cutoff=5",
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder to write (default: runs/ and the first file's name)")
    parser.add_argument("--valid", metavar="FILE", help="structures to validate on")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.1, metavar="F", help="without --valid: share of the frames (0.1)"
    )
    parser.add_argument(
        "--split-by", metavar="KEY", help="draw whole groups to validate on: composition, or a key of the frames' info"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the first weights (0)")
    parser.add_argument("--size", choices=("small", "medium", "large"), help="of the network (default: small)")
    parser.add_argument("--from", dest="start", metavar="CHECKPOINT", help="inference checkpoint to fine-tune")
    parser.add_argument("--resume", action="store_true", help="go on with the training in --output")
    parser.add_argument("--skip-bad", action="store_true", help="leave out frames that cannot be used, with a list")
    parser.add_argument(
        "--max-force", type=float, default=50.0, metavar="F", help="frames with larger forces are bad (50 eV/Å)"
    )
    for label in ("energy", "forces", "stress", "charge", "spin"):
        parser.add_argument(f"--{label}-key", metavar="NAME", help=f"name of the {label} in the files")


def run(args: argparse.Namespace) -> int:
    """Prepare, train, and print the table."""
    from e2former_fairchem.own_data.reading import Keys
    from e2former_fairchem.own_data.train import train

    is_file = [re.match(r"[\w.]+=", text) is None or Path(text).exists() for text in args.arguments]
    files = [text for text, file in zip(args.arguments, is_file, strict=True) if file]
    overrides = [text for text, file in zip(args.arguments, is_file, strict=True) if not file]
    train(
        *files,
        output=args.output,
        valid=args.valid,
        valid_fraction=args.valid_fraction,
        split_by=args.split_by,
        seed=args.seed,
        size=args.size,
        from_checkpoint=args.start,
        keys=Keys(**{label: getattr(args, f"{label}_key") for label in Keys.__dataclass_fields__}),
        max_force=args.max_force,
        skip_bad=args.skip_bad,
        resume=args.resume,
        overrides=overrides,
    )
    return 0
