"""Fine-tune a potential on structures of one's own, of another level of theory, and compare it with what it was.

    python examples/fine_tuning.py [CHECKPOINT]

The structures are a file like any of yours: here some of the bundled sample's (wB97M-V/def2-SVP), of molecules that
gfn2-small has not seen either. The element references are moved to the new level of theory, and errors before are those
with moved references. The same on the command line: `e2former-fairchem train mine.xyz --from gfn2-small`.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ase.io import write
from common import arguments, new_folder, run
from fairchem.core.datasets import AseDBDataset

import e2former_fairchem
from e2former_fairchem.training.resolvers import sample


def main() -> None:
    """Write a file, train into a new folder, and print the errors before and after."""
    args = arguments(__doc__, structures=40, epochs=20)
    data = AseDBDataset({"src": sample("val_new")})
    with TemporaryDirectory() as folder:
        file = Path(folder, "mine.xyz")
        write(file, [data.get_atoms(n) for n in range(args.structures)])
        result = e2former_fairchem.train(
            file,
            output=new_folder("runs/fine_tuning"),
            from_checkpoint=args.checkpoint,
            overrides=[f"epochs={args.epochs}", "card.level_of_theory=wB97M-V/def2-SVP"],
        )
    before, after = (result.errors[f"validation, {when}"] for when in ("before", "after"))
    print(f"forces of structures held out: {before.forces:.3f} -> {after.forces:.3f} eV/Å")


if __name__ == "__main__":
    run(main)
