"""Relax a molecule with LBFGS and with FIRE, from the same displaced geometry.

python examples/relaxation.py [CHECKPOINT]
"""

from __future__ import annotations

from ase.build import molecule
from ase.optimize import FIRE, LBFGS
from common import arguments, calculator, run


def main() -> None:
    """Print the energy gained, the steps and the largest remaining force."""
    args = arguments(__doc__, steps=200)
    calc = calculator(args.checkpoint)
    for optimizer in (LBFGS, FIRE):
        atoms = molecule("CH3CH2OH")
        atoms.info.update(charge=0, spin=1)  # spin is the multiplicity: 1 is a singlet
        atoms.rattle(0.05, seed=1)
        atoms.calc = calc
        before = atoms.get_potential_energy()
        run = optimizer(atoms, logfile=None)
        converged = run.run(fmax=0.03, steps=args.steps)
        gained = before - atoms.get_potential_energy()
        largest = (atoms.get_forces() ** 2).sum(1).max() ** 0.5
        state = "converged" if converged else "not converged"
        print(f"{optimizer.__name__:5s} {state} in {run.nsteps} steps: gained {gained:.4f} eV, fmax {largest:.4f} eV/Å")


if __name__ == "__main__":
    run(main)
