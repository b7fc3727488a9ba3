"""``e2former-fairchem fit-references``: references of one's own data, for ``element_references=FILE.json``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("data", metavar="DATA", help="training data: a folder of .aselmdb files, one file or a pattern")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json", help="file to write")
    parser.add_argument(
        "--structures",
        type=int,
        default=100_000,
        metavar="N",
        help="use at most N structures, evenly spread (default: 100000)",
    )


def run(args: argparse.Namespace) -> int:
    """Fit, write, and say how well references alone describe the energies."""
    from e2former_fairchem.data.checks import check_dataset
    from e2former_fairchem.data.references import fit_element_references, read_energies
    from e2former_fairchem.files import write_text

    if args.structures < 1:
        raise ValueError(f"--structures: expected at least 1, got {args.structures}")
    if not args.output.endswith(".json"):
        raise ValueError(f"--output: expected a name that ends in .json, got {args.output}")
    data = check_dataset("DATA", args.data)
    fitted = fit_element_references(*read_energies(data, args.structures))
    table = {z: float(value) for z, value in enumerate(fitted.table) if z and math.isfinite(value)}
    median, largest = float(np.median(fitted.residuals)), float(fitted.residuals.max())
    number = len(fitted.residuals)
    content = {
        "element_references": {str(z): round(value, 6) for z, value in table.items()},
        "charge_reference": round(float(fitted.table[0]), 6),
        "unit": "eV",
        "data": data,
        "structures": number,
        "residual_eV_per_atom": {"median": round(median, 6), "largest": round(largest, 6)},
    }
    write_text(Path(args.output).absolute(), json.dumps(content, indent=1) + "\n")
    said = [f"{chemical_symbols[z]} {value:.3f}" for z, value in table.items()]
    print(", ".join([*said, f"a charge of +1 {fitted.table[0]:.3f}"] if fitted.table[0] else said) + " eV")
    print(f"left of the energies of {number:,} structures: median {median:.3g}, largest {largest:.3g} eV/atom")
    if fitted.undetermined:
        print(
            f"{', '.join(fitted.undetermined)} always come in the same ratios: only the sums of their references are "
            "fixed, each is as near as can be to OMol25's or to zero"
        )
    print(f"wrote {args.output}; train with element_references={args.output}")
    return 0
