"""One structure on several workers: each computes a part of the atoms and the result is that of one.

    python examples/graph_parallel.py [CHECKPOINT] [--workers 2] [--atoms 96]

A GPU for every worker where there are GPUs, processes of this machine elsewhere. Needs `pip install "ray[serve]"`.
For systems that are too large or too slow for one GPU; a small molecule is slower this way.
"""

from __future__ import annotations

import logging
import time

import torch
from ase import Atoms
from ase.build import molecule
from common import arguments, calculator, run
from fairchem.core import FAIRChemCalculator
from fairchem.core.common import distutils


def water_grid(number: int) -> Atoms:
    """Molecules of water 3 Å apart."""
    found, side = Atoms(), round((number / 3) ** (1 / 3) + 0.5)
    for n in range(number // 3):
        one = molecule("H2O")
        one.translate([3.0 * (n % side), 3.0 * (n // side % side), 3.0 * (n // side**2)])
        found += one
    found.rattle(0.02, seed=0)
    found.info.update(charge=0, spin=1)
    return found


def main() -> None:
    """Energy and forces on one worker and on several, and the time of a step."""
    args = arguments(__doc__, workers=2, atoms=96)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    atoms = water_grid(args.atoms)
    # One worker first: worker 0 of a parallel calculator lives in this process, beside which no other model may run.
    atoms.calc = calculator(args.checkpoint)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    # "batch" sends whole structures, so that charge, spin and elements may change between calls. The default compiles
    # and, after the first call, sends positions and cell alone; a change of anything else is then an error.
    atoms.calc = FAIRChemCalculator.from_model_checkpoint(
        args.checkpoint, task_name="omol", inference_settings="batch", device=device, workers=args.workers
    )
    logging.disable(logging.WARNING)
    apart = abs(atoms.get_potential_energy() - energy), abs(atoms.get_forces() - forces).max()
    atoms.rattle(0.01, seed=1)
    start = time.perf_counter()
    atoms.get_forces()
    seconds = time.perf_counter() - start
    print(f"{len(atoms)} atoms on {args.workers} workers: {1000 * seconds:.0f} ms a step")
    print(f"difference from one worker: {1000 * apart[0] / len(atoms):.4f} meV/atom, {apart[1]:.1e} eV/Å")
    distutils.cleanup_gp_ray()  # end the workers; after this other models run in this process again


if __name__ == "__main__":
    run(main)
