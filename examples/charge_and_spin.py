"""Charge and spin multiplicity: single atoms, ions and open shells, set in atoms.info.

python examples/charge_and_spin.py [CHECKPOINT]
"""

from __future__ import annotations

from ase import Atoms
from ase.build import molecule
from common import arguments, calculator


def main() -> None:
    """Print energies by charge and spin, and differences that chemistry asks for."""
    args = arguments(__doc__)
    calc = calculator(args.checkpoint)

    def energy(atoms: Atoms, charge: int, spin: int) -> float:
        atoms = atoms.copy()
        atoms.info.update(charge=charge, spin=spin)
        atoms.calc = calc
        return atoms.get_potential_energy()

    for symbol, charge, spin in (("H", 0, 2), ("O", 0, 3), ("Cl", -1, 1)):
        print(f"atom {symbol:2s} charge {charge:+d} spin {spin}: {energy(Atoms(symbol), charge, spin):14.4f} eV")
    methylene = molecule("CH2_s3B1d")
    gap = energy(methylene, 0, 1) - energy(methylene, 0, 3)
    print(f"CH2, vertical singlet - triplet: {gap:+.3f} eV")
    water = molecule("H2O")
    print(f"H2O, vertical ionisation energy: {energy(water, 1, 2) - energy(water, 0, 1):.3f} eV")
    together = molecule("HCl")
    atoms = energy(Atoms("H"), 0, 2) + energy(Atoms("Cl"), 0, 2)
    print(f"HCl, energy of atomisation: {atoms - energy(together, 0, 1):.3f} eV")


if __name__ == "__main__":
    main()
