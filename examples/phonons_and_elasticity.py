"""Phonons and elastic constants of diamond with fairchem's own runners.

gfn2-small has seen no crystal: it makes diamond more than twice as stiff as measured (442 GPa, shear 535). Its numbers
show that the runners run; take a potential of crystals for others. For structures from files there are
configs/evaluate/phonons.yaml and configs/evaluate/elasticity.yaml.

    python examples/phonons_and_elasticity.py [CHECKPOINT] [--supercell 2]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from common import arguments, calculator, run
from fairchem.core.components.calculate import ElasticityRunner, MDRPhononRunner
from fairchem.core.components.calculate.recipes.phonons import get_phonopy_object


def main() -> None:
    """Print frequencies and thermal properties, then the moduli."""
    args = arguments(__doc__, supercell=2)
    calc = calculator(args.checkpoint, torch.float64)  # force constants are differences of forces
    crystal = bulk("C", "diamond", a=3.57)
    crystal.info.update(charge=0, spin=1, sid="diamond")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "diamond.yaml"
        get_phonopy_object(crystal, supercell_matrix=np.diag([args.supercell] * 3)).save(file)
        (phonons,) = MDRPhononRunner(calc, [file]).calculate()
    if phonons["errors"]:
        raise RuntimeError(phonons["errors"])
    print(f"phonons: highest frequency {phonons['max_freq']:.0f} K, mean {phonons['avg_freq']:.0f} K")
    print(f"at 300 K: entropy {phonons['entropy']:.2f} J/K/mol, heat capacity {phonons['heat_capacity']:.2f} J/K/mol")

    (elastic,) = ElasticityRunner(calc, [crystal]).calculate()
    if elastic["errors"]:
        raise RuntimeError(elastic["errors"])
    print(f"moduli: bulk {elastic['bulk_modulus_vrh']:.0f} GPa, shear {elastic['shear_modulus_vrh']:.0f} GPa")


if __name__ == "__main__":
    run(main)
