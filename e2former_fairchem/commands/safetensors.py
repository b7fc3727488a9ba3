"""``e2former-fairchem safetensors``: inference checkpoints to and from files without pickles."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="IN", help="checkpoint (IN.pt, which is unpickled) or IN.safetensors")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the other kind: OUT.safetensors or OUT.pt"
    )


def run(args: argparse.Namespace) -> int:
    """Export or import, by the suffix of the source."""
    from e2former_fairchem.interop.checkpoint_file import export_safetensors, import_safetensors

    convert = import_safetensors if args.source.endswith(".safetensors") else export_safetensors
    print(f"wrote {convert(args.source, args.output)}")
    return 0
