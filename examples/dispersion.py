"""Dispersion for a checkpoint that learned PBE: two methane molecules, with D3 and without.

    python examples/dispersion.py CHECKPOINT

gfn2-small is refused, and so is what learned OMol25 or the sample: GFN2-xTB has D4 dispersion in it, wB97M-V its own.
fairchem downloads D3's coefficients at the first use.
"""

from __future__ import annotations

import numpy as np
from ase.build import molecule
from common import arguments, run

from e2former_fairchem import DispersionCalculator


def main() -> None:
    """Print the energy of the pair at some distances, and D3's part of it."""
    args = arguments(__doc__, steps=5)
    calc = DispersionCalculator(args.checkpoint, inference_settings="traineval")
    for distance in np.linspace(3.5, 5.5, args.steps):
        atoms = molecule("CH4")
        other = atoms.copy()
        other.translate([0, 0, distance])
        atoms += other
        atoms.info.update(charge=0, spin=1)
        atoms.calc = calc
        energy = atoms.get_potential_energy()
        print(
            f"{distance:.1f} Å: {energy:.4f} eV, of which dispersion {calc.results['energy_contributions'][1]:.4f} eV"
        )


if __name__ == "__main__":
    run(main)
