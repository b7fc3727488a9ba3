"""Charge and spin multiplicity: ions and open shells, set in atoms.info.

    python examples/charge_and_spin.py [CHECKPOINT]

Geometries are ASE's, with a hydrogen less for anions and radicals; nothing is relaxed. In brackets stands GFN2-xTB, the
level of theory that gfn2-small learned, by tblite 0.8.0 on the same geometries. It is not experiment: acetone's
ionisation energy is 5 eV above the measured 9.7. Small ions that training has not seen are not what gfn2-small is good
at: the energy of H3O+ is 0.7 eV away from GFN2-xTB's.
"""

from __future__ import annotations

from ase.build import molecule
from common import arguments, calculator, run


def main() -> None:
    """Print energies by charge and spin, and the differences that chemistry asks for."""
    args = arguments(__doc__)
    calc = calculator(args.checkpoint)

    def energy(name: str, charge: int, spin: int, without: int | None = None) -> float:
        atoms = molecule(name)
        label = name if without is None else f"{name} less H{without}"
        if without is not None:
            del atoms[without]
        atoms.info.update(charge=charge, spin=spin)
        atoms.calc = calc
        found = atoms.get_potential_energy()
        print(f"{label:16s} charge {charge:+d} spin {spin}: {found:14.4f} eV")
        return found

    ionisation = energy("CH3COCH3", 1, 2) - energy("CH3COCH3", 0, 1)
    methanol = energy("CH3OH", 0, 1)  # H3 is at the oxygen, H4 at the carbon
    acetic = energy("CH3COOH", -1, 1, 3) - energy("CH3COOH", 0, 1)
    acidity = energy("CH3OH", -1, 1, 3) - methanol - acetic
    bonds = energy("CH3OH", 0, 2, 3) - energy("CH3OH", 0, 2, 4)
    print(f"acetone, ionisation energy: {ionisation:+.3f} eV (+14.651)")
    print(f"taking a proton, methanol above acetic acid: {acidity:+.3f} eV (+1.523)")
    print(f"taking H from methanol, O-H above C-H: {bonds:+.3f} eV (+0.315)")


if __name__ == "__main__":
    run(main)
