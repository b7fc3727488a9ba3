"""Fine-tune a checkpoint on structures of one's own, with fairchem's trainer.

    python examples/fine_tuning.py [CHECKPOINT]

The structures (here some of the bundled sample's, from molecules that the quickstart has not seen) become a data set in
fairchem's format. The run starts from the checkpoint's averaged weights, with the quickstart's network, normaliser and
element references. For another checkpoint add those that it was trained with: backbone=NAME, normalizer_rmsd=NUMBER and
element_references=NAME.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ase import Atoms
from common import arguments
from fairchem.core.datasets import AseDBDataset

from e2former_fairchem.data.make_sample import write_folder
from e2former_fairchem.training.resolvers import sample

ROOT = Path(__file__).resolve().parents[1]


def structures(number: int) -> list[Atoms]:
    """Structures with energy and forces (ASE's calculator results), and charge, spin and source in their info."""
    data = AseDBDataset({"src": sample("val_new")})
    return [data.get_atoms(n) for n in range(number)]


def command(checkpoint: str, folder: Path, epochs: int) -> list[str]:
    """What follows `fairchem` on the command line."""
    return [
        "-c",
        str(ROOT / "configs" / "quickstart.yaml"),
        "model=from_checkpoint",
        "dataset=folders",
        f"checkpoint={checkpoint}",
        f"data_train={folder / 'train'}",
        f"data_val={folder / 'val'}",
        f"epochs={epochs}",
        "lr=2e-4",
        "batch_size=8",
        f"job.run_dir={folder / 'run'}",
    ]


def main() -> None:
    """Write the data set below runs/fine_tuning, and train."""
    args = arguments(__doc__, structures=40, epochs=5)
    folder = Path("runs/fine_tuning").absolute()
    found = structures(args.structures)
    write_folder(found[::5], folder / "val")
    write_folder([atoms for n, atoms in enumerate(found) if n % 5], folder / "train")
    line = command(str(Path(args.checkpoint).absolute()), folder, args.epochs)
    print("fairchem", " ".join(line), flush=True)
    sys.exit(subprocess.run([str(Path(sys.executable).with_name("fairchem")), *line]).returncode)


if __name__ == "__main__":
    main()
