"""The file of a potential that comes with the package, from what a training on GFN2-xTB labels exported.

    python benchmarks/gfn2/bundle.py CHECKPOINT ERRORS.json e2former_fairchem/weights/gfn2-small.pt

Averaged weights only, licence, and beside the errors on validation structures those on molecules that training has not
seen (ERRORS.json of evaluate.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from e2former_fairchem.interop.checkpoint_file import make_checkpoint, write_checkpoint
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import read_checkpoint

LICENCE = "MIT"


def bundle(source: Path, errors: Path, destination: Path) -> Path:
    """Write the file; its path, absolute."""
    checkpoint = read_checkpoint(source)
    averaged = checkpoint.ema_state_dict
    weights = {key.removeprefix("module."): value for key, value in averaged.items() if key != "n_averaged"}
    mean = json.loads(errors.read_text())["all"]
    new = {"energy": mean["energy"] / 1000, "forces": mean["forces"] / 1000}
    card = dict(read_card(checkpoint)) | {"licence": LICENCE}
    for training in card.get("trained_before", []):  # the file has its name from now on
        training["name"] = f"earlier {training['name'].removeprefix('earlier ')}"
    card["validation"] = card["validation"] | {"molecules that training has not seen": new}
    counter = int(averaged["n_averaged"])
    made = make_checkpoint(checkpoint.model_config, weights, checkpoint.tasks_config, counter, card)
    return write_checkpoint(made, destination)


def main() -> None:
    """Write it, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "errors", "destination"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    written = bundle(options.checkpoint, options.errors, options.destination)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
