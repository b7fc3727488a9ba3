"""Vibrations of water from the analytic Hessian, and from ASE's finite differences of the forces.

python examples/vibrations.py [CHECKPOINT]
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from ase.build import molecule
from ase.optimize import LBFGS
from ase.vibrations import Vibrations, VibrationsData
from common import arguments, calculator, run


def main() -> None:
    """Print wavenumbers both ways, and how far the two Hessians are apart."""
    args = arguments(__doc__, steps=100)
    calc = calculator(args.checkpoint, torch.float64)
    atoms = molecule("H2O")
    atoms.info.update(charge=0, spin=1)
    atoms.calc = calc
    LBFGS(atoms, logfile=None).run(fmax=1e-4, steps=args.steps)
    # A second calculator: with the Hessian on request, every call computes it, row by row.
    atoms.calc = calculator(args.checkpoint, torch.float64, predict_untrained_hessian={"omol"})
    hessian = np.array(atoms.calc.get_property("hessian", atoms))  # eV/Å^2, [3N, 3N]
    atoms.calc = calc
    symmetric = 0.5 * (hessian + hessian.T)
    analytic = VibrationsData.from_2d(atoms, symmetric).get_frequencies()

    with tempfile.TemporaryDirectory() as folder:
        differences = Vibrations(atoms, name=f"{folder}/vib", delta=1e-3)
        differences.run()
        numeric = differences.get_vibrations()
    print("analytic Hessian, cm^-1:  ", " ".join(f"{x.real:.1f}" for x in analytic[-3:]))
    print("finite differences, cm^-1:", " ".join(f"{x.real:.1f}" for x in numeric.get_frequencies()[-3:]))
    apart = np.abs(symmetric - numeric.get_hessian_2d()).max() / np.abs(symmetric).max()
    asymmetry = np.abs(hessian - hessian.T).max() / np.abs(symmetric).max()
    print(f"largest relative difference of the Hessians {apart:.1e}, asymmetry of the analytic one {asymmetry:.1e}")


if __name__ == "__main__":
    run(main)
