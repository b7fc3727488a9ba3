"""An ensemble of checkpoints as one calculator: how far its members are apart as a bond is stretched.

    python examples/ensemble.py CHECKPOINT CHECKPOINT [CHECKPOINT ...]

Trainings with several seeds give the members: fairchem -c configs/quickstart.yaml job.seed=1 job.run_dir=runs/second
"""

from __future__ import annotations

import numpy as np
from ase.build import molecule
from common import arguments, run

from e2former_fairchem import EnsembleCalculator


def main() -> None:
    """Print energy and spread at each length."""
    args = arguments(__doc__, several=True, steps=6)
    atoms = molecule("H2O")
    atoms.info.update(charge=0, spin=1)
    atoms.calc = EnsembleCalculator(args.checkpoints, task_name="omol", inference_settings="traineval")
    for length in np.linspace(0.9, 1.9, args.steps):
        atoms.set_distance(0, 1, length, fix=0)
        energy = atoms.get_potential_energy()
        spread = atoms.calc.results  # energy_std, eV; forces_std, eV/Å, of each atom
        print(
            f"O-H {length:.2f} Å: {energy:.3f} ± {spread['energy_std']:.3f} eV, "
            f"forces ± {spread['forces_std'].max():.3f} eV/Å"
        )


if __name__ == "__main__":
    run(main)
