"""Node embeddings: which hydrogens of ethanol the network holds to be alike.

python examples/embeddings.py [CHECKPOINT]
"""

from __future__ import annotations

import torch
from ase.build import molecule
from common import arguments, calculator, run

from e2former_fairchem import embeddings


def main() -> None:
    """Print the cosine between the invariants of the hydroxyl's hydrogen and of all others."""
    args = arguments(__doc__)
    atoms = molecule("CH3CH2OH")
    atoms.info.update(charge=0, spin=1)
    found = embeddings(calculator(args.checkpoint), atoms)
    number, rows, channels = found.equivariant.shape
    print(f"{number} atoms, {channels} channels, {rows} rows of degrees 0 to {round(rows**0.5) - 1}")
    hydrogens = [atom.index for atom in atoms if atom.symbol == "H"]
    hydroxyl = min(hydrogens, key=lambda h: atoms.get_distance(h, 2))  # atom 2 is the oxygen
    for h in hydrogens:
        cosine = torch.cosine_similarity(found.invariant[hydroxyl], found.invariant[h], dim=0)
        print(f"H{h}, {atoms.get_distance(h, 2):.2f} Å from O: {cosine:+.3f}")


if __name__ == "__main__":
    run(main)
