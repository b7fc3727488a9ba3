"""``e2former-fairchem convert-molfm``: the authors' weights as a fairchem inference checkpoint."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("weights", metavar="WEIGHTS", help="released torch file (its entry 'model'), or .safetensors")
    parser.add_argument("config", metavar="CONFIG.yaml", help="the flattened YAML beside the weights")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.pt", help="checkpoint to write; OUT.safetensors holds no pickle"
    )
    parser.add_argument("--head", help="data set whose heads to use (default: omol25, or the only one)")
    parser.add_argument(
        "--release",
        choices=("v2", "v1.5"),
        default="v1.5",
        help="code that the weights were trained with: the same weights are different functions (default: v1.5, the "
        "published weights'; v2 is the tag E2Former-V2)",
    )
    parser.add_argument("--task", help="name of fairchem's task (default: omol; oc20 for the head of that name)")
    parser.add_argument(
        "--references",
        metavar="FILE.json",
        help="element references, eV by atomic number, or none (default: the head's)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and say what was done."""
    from e2former_fairchem.interop.molfm import convert_molfm_checkpoint

    report = convert_molfm_checkpoint(
        args.weights,
        args.config,
        args.output,
        head=args.head,
        release=args.release,
        task=args.task,
        references=args.references,
    )
    forces = "the energy's gradient" if report.conserving else "a head's (direct)"
    print(f"wrote {report.destination}: {report.parameters:,} parameters, release {report.release}, head {report.head}")
    print(f"task {report.task}: energies in eV (1 unit of the network = {report.unit:g} eV), forces are {forces}")
    print(f"element references: {', '.join(report.elements)}")
    if len(report.elements) < 118:
        print("energies of structures with other elements are NaN; forces do not need references")
    print(f"unused keys of the weights ({len(report.unused)}): {', '.join(report.unused) or 'none'}")
    return 0
