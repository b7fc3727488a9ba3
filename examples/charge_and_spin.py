"""Charge and spin multiplicity: ions and open shells, set in atoms.info.

    python examples/charge_and_spin.py [CHECKPOINT]

All five species are in the quickstart's data, whose own differences (of the lowest structures, wB97M-V/def2-SVP) stand
in brackets. Of others the quickstart's potential knows nothing, single atoms among them.
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

    gap = energy("CH2_s1A1d", 0, 1) - energy("CH2_s3B1d", 0, 3)
    ionisation = energy("H2O", 1, 2) - energy("H2O", 0, 1)
    affinity = energy("NO2", 0, 2) - energy("NO2", -1, 1)
    print(f"CH2, singlet - triplet: {gap:+.3f} eV (+0.515)")
    print(f"H2O, ionisation energy: {ionisation:+.3f} eV (+12.230)")
    print(f"NO2, electron affinity: {affinity:+.3f} eV (+0.944)")


if __name__ == "__main__":
    main()
