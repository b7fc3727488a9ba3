"""Batched relaxation with torch-sim (Python 3.12 or later).

    pip install "fairchem-core[torchsim]"
    python examples/torch_sim_relaxation.py [CHECKPOINT]

fairchem's interface takes the name of one of UMA's tasks (ours is omol), always uses the `batch` preset, and reads
charge and spin from atoms.info.
"""

from __future__ import annotations

import torch
from ase.build import molecule
from common import arguments, run


def main() -> None:
    """Relax three molecules at once and print their energies before and after."""
    args = arguments(__doc__, steps=50)
    import torch_sim as ts
    from fairchem.core.calculate.torchsim_interface import FairChemModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = FairChemModel(model=args.checkpoint, task_name="omol", device=device)
    systems = []
    for n, name in enumerate(("H2O", "NH3", "CH3OH")):
        atoms = molecule(name)
        atoms.rattle(0.05, seed=n)
        atoms.center(vacuum=10.0)
        atoms.info.update(charge=0, spin=1)
        systems.append(atoms)
    state = ts.initialize_state(systems, device=device, dtype=torch.float32)
    before = model(state)["energy"]
    final = ts.optimize(system=state, model=model, optimizer=ts.Optimizer.fire, max_steps=args.steps)
    for atoms, first, last in zip(systems, before.tolist(), final.energy.tolist(), strict=True):
        print(f"{atoms.get_chemical_formula():6s} {first:12.4f} eV -> {last:12.4f} eV")


if __name__ == "__main__":
    run(main)
