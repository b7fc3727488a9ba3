"""Charge and spin multiplicity: ions and open shells, set in atoms.info.

    python examples/charge_and_spin.py [CHECKPOINT]

All six species are in the quickstart's data, whose own differences (of the lowest structures, wB97M-V/def2-SVP) stand
in brackets. Single atoms are not, so that its potential says nothing about them.
"""

from __future__ import annotations

from ase.build import molecule
from common import arguments, calculator


def main() -> None:
    """Print energies by charge and spin, and the differences that chemistry asks for."""
    args = arguments(__doc__)
    calc = calculator(args.checkpoint)

    def energy(name: str, charge: int, spin: int) -> float:
        atoms = molecule(name)
        atoms.info.update(charge=charge, spin=spin)
        atoms.calc = calc
        found = atoms.get_potential_energy()
        print(f"{name:10s} charge {charge:+d} spin {spin}: {found:14.4f} eV")
        return found

    water = energy("H2O", 1, 2) - energy("H2O", 0, 1)
    methyl = energy("CH3", 1, 1) - energy("CH3", 0, 2)
    affinity = energy("NO2", 0, 2) - energy("NO2", -1, 1)
    print(f"H2O, ionisation energy: {water:+.3f} eV (+12.230)")
    print(f"CH3, ionisation energy: {methyl:+.3f} eV (+9.696)")
    print(f"NO2, electron affinity: {affinity:+.3f} eV (+0.944)")


if __name__ == "__main__":
    main()
