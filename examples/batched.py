"""Many structures at once: one call for a batch, and concurrent relaxations whose steps fairchem batches (Ray Serve).

    python examples/batched.py [CHECKPOINT]

The second part needs `pip install "ray[serve]"` and is left out without it.
"""

from __future__ import annotations

import importlib.util
import time

from ase import Atoms
from ase.build import molecule
from ase.optimize import LBFGS
from common import arguments, predict_unit, run
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch


def structures(number: int) -> list[Atoms]:
    """Displaced small molecules of different sizes."""
    found = []
    for n in range(number):
        atoms = molecule(("H2O", "CH3OH", "NH3", "CH4", "CH3CN")[n % 5])
        atoms.rattle(0.05, seed=n)
        atoms.info.update(charge=0, spin=1)
        found.append(atoms)
    return found


def main() -> None:
    """Compare a batch with single calls, then relax structures concurrently."""
    args = arguments(__doc__, number=10, steps=5)
    unit = predict_unit(args.checkpoint)
    keys = {"task_name": "omol", "r_data_keys": ["spin", "charge"]}  # without r_data_keys charge and spin are lost
    systems = structures(args.number)
    data = [AtomicData.from_ase(atoms, **keys) for atoms in systems]
    unit.predict(atomicdata_list_to_batch(data[:1]))  # the first call prepares the model
    start = time.perf_counter()
    together = unit.predict(atomicdata_list_to_batch(data))
    batched = time.perf_counter() - start
    start = time.perf_counter()
    single = [unit.predict(atomicdata_list_to_batch([one]))["energy"].item() for one in data]
    alone = time.perf_counter() - start
    apart = max(abs(a - b) for a, b in zip(together["energy"].tolist(), single, strict=True))
    print(f"{len(systems)} structures: {1000 * batched:.0f} ms in one batch, {1000 * alone:.0f} ms one by one")
    print(f"largest difference of an energy: {1000 * apart:.4f} meV")

    if importlib.util.find_spec("ray") is None:
        print("Ray is not installed: no concurrent relaxations")
        return
    from fairchem.core.calculate import InferenceBatcher

    with InferenceBatcher(unit, max_batch_size=512, concurrency_backend_options={"max_workers": 4}) as batcher:

        def relax(atoms: Atoms) -> float:
            atoms.calc = FAIRChemCalculator(batcher.batch_predict_unit, task_name="omol")
            LBFGS(atoms, logfile=None).run(fmax=0.05, steps=args.steps)
            return atoms.get_potential_energy()

        energies = list(batcher.executor.map(relax, systems))
    print(f"relaxed {len(energies)} structures concurrently, {args.steps} steps at most each")


if __name__ == "__main__":
    run(main)
