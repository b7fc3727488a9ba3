"""Train on crystals with their stress, and relax a cell with the result.

    python examples/crystals.py

The set is made here: strained and rattled metals with the energies, forces and stress of a toy potential (ASE's EMT).
The same on the command line, for a file of yours: `e2former-fairchem train crystals.xyz`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import FIRE
from common import new_folder, run
from fairchem.core import FAIRChemCalculator

import e2former_fairchem


def crystals(number: int) -> list[Atoms]:
    """Cubic cells of Cu, Ni, Al and of ordered alloys, with labels."""
    rng, found = np.random.default_rng(0), []
    for n in range(number):
        atoms = bulk(("Cu", "Ni", "Al")[n % 3], cubic=True)
        if n % 2:
            atoms.symbols[0] = ("Ni", "Al", "Cu")[n % 3]
        strain = np.eye(3) + rng.normal(scale=0.02, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (0.5 * (strain + strain.T)), scale_atoms=True)
        atoms.rattle(0.05, rng=rng)
        atoms.calc = EMT()
        atoms.get_stress()
        found.append(atoms)
    return found


def main() -> None:
    """Train into a new folder; print the errors and a relaxed lattice constant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=int, default=200, help="default: 200")
    parser.add_argument("--epochs", type=int, default=40, help="default: 40")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        file = Path(folder, "crystals.xyz")
        write(file, crystals(args.structures))
        result = e2former_fairchem.train(
            file, output=new_folder("runs/crystals"), overrides=[f"epochs={args.epochs}", "card.level_of_theory=EMT"]
        )
    print(f"stress of cells held out: {1000 * result.errors['validation'].stress:.2f} meV/Å^3")

    def relaxed(calculator) -> float:
        atoms = bulk("Cu", a=3.7)
        atoms.info.update(charge=0, spin=1)
        atoms.calc = calculator
        FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=100)
        return (4 * atoms.get_volume()) ** (1 / 3)

    ours = FAIRChemCalculator.from_model_checkpoint(str(result.checkpoint), inference_settings="traineval")
    print(f"copper, lattice constant: {relaxed(ours):.3f} Å (EMT: {relaxed(EMT()):.3f})")


if __name__ == "__main__":
    run(main)
