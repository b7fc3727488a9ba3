"""Stress of a periodic cell, checked against finite differences of the energy, and relaxation of positions and cell.

The cell, of two ammonia molecules, is smaller than the cutoff: images are neighbours. fairchem adds a stress task to
every conserving model. gfn2-small has seen clusters and no crystal: its stress is the derivative of its energy, but
the pressure of the first cell, -0.54 GPa, is +0.32 GPa by GFN2-xTB (tblite 0.8.0, 2 x 2 x 2 cells), which it learned.

    python examples/cell_relaxation.py [CHECKPOINT]
"""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from common import arguments, calculator, run


def crystal() -> Atoms:
    """Two ammonia molecules, one turned, in an orthorhombic cell."""
    first, second = molecule("NH3"), molecule("NH3")
    second.rotate(180, "x")
    second.translate([2.3, 2.4, 0.5])
    both = first + second
    both.set_cell([4.6, 4.8, 4.2])
    both.pbc = True
    both.info.update(charge=0, spin=1)
    return both


def main() -> None:
    """Print stress, its numerical check, and volume and pressure before and after."""
    args = arguments(__doc__, steps=60)
    atoms = crystal()
    atoms.calc = calculator(args.checkpoint, torch.float64)
    stress = voigt_6_to_full_3x3_stress(atoms.get_stress())
    step = 1e-4
    energies = []
    for sign in (1, -1):
        strained = atoms.copy()
        strain = np.eye(3)
        strain[0, 0] += sign * step
        strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        strained.calc = atoms.calc
        energies.append(strained.get_potential_energy())
    numeric = (energies[0] - energies[1]) / (2 * step * atoms.get_volume())
    print(f"stress xx {stress[0, 0]:+.6f} eV/Å^3, by finite differences {numeric:+.6f}")

    def state() -> str:
        pressure = -np.trace(voigt_6_to_full_3x3_stress(atoms.get_stress())) / 3 / units.GPa
        return f"volume {atoms.get_volume():.2f} Å^3, pressure {pressure:+.2f} GPa"

    print("before:", state())
    run = FIRE(FrechetCellFilter(atoms), logfile=None)
    run.run(fmax=0.05, steps=args.steps)
    print(f"after {run.nsteps} steps:", state())


if __name__ == "__main__":
    run(main)
