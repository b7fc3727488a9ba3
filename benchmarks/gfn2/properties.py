"""What a potential trained on GFN2-xTB labels does with molecules that training has not seen.

    python benchmarks/gfn2/properties.py CHECKPOINT FOLDER [relax dynamics speed] [--output FILE.json] [--device cuda]

FOLDER: files of make_gfn2.py, whose test structures give the molecules.

relax     displaced molecules, and minima of GFN2-xTB after noise, to minima of the potential (extra ``data``): root
          mean square distance of the atoms from the minimum of GFN2-xTB, and the share within 0.1 Å
dynamics  all molecules in one batch, velocity Verlet from 300 K, 0.5 fs: the longest that a bond gets over its length
          at the start, and the drift of the total energy
speed     energy and forces of water clusters, moved every time, by the calculator, and by GFN2-xTB on one core if
          tblite is there

``relax`` and ``dynamics`` in strict float32, ``speed`` with fairchem's default preset.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.build import minimize_rotation_and_translation
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii
from ase.optimize import LBFGS
from fairchem.core import FAIRChemCalculator
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

from e2former_fairchem.data.make_gfn2 import CLASSES, GFN2, ForASE, water_cluster
from e2former_fairchem.data.packed import PackedDataset
from e2former_fairchem.md.engine import draw_velocities
from e2former_fairchem.training.checkpoint import check_checkpoint_path

STRICT = InferenceSettings(tf32=False, activation_checkpointing=False, compile=False)
KELVIN, STEP = 300.0, 0.5
#: A bond: atoms closer than so many times the sum of their covalent radii.
BONDED = 1.2
CLOSE_ENOUGH, NOISE = 0.1, 0.05  # Å
WATERS = (7, 33, 167, 667)


def molecules(folder: Path, kind: str, most: int) -> Iterator[Atoms]:
    """Neutral test molecules of a class of structures, one of each formula, evenly spread."""
    names = {"energy": "omol_energy", "forces": "omol_forces"}
    data = PackedDataset({"src": str(folder), "part": "test", "key_mapping": names})
    found: dict[str, Atoms] = {}
    for number in np.flatnonzero(data.kinds() == CLASSES.index(kind)):
        one = data[int(number)]
        if int(one.charge) == 0 and int(one.spin) == 1:
            atoms = Atoms(one.atomic_numbers.numpy(), one.pos.numpy(), info={"charge": 0, "spin": 1})
            found[atoms.get_chemical_formula()] = atoms
    chosen = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).astype(int))
    yield from (list(found.values())[n] for n in chosen)


def relax(checkpoint: Path, folder: Path, device: str, most: int = 100) -> dict[str, dict[str, float]]:
    """Distances of the potential's minima from those of GFN2-xTB.

    ``same_start``: both relax the same displaced structure, and soft ones can go to different minima. ``from_minimum``:
    the potential relaxes the minimum of GFN2-xTB after noise of `NOISE`.
    """
    unit = load_predict_unit(str(checkpoint), inference_settings=STRICT, device=device)
    distances: dict[str, list[float]] = {"same_start": [], "from_minimum": []}
    random = np.random.default_rng(0)
    for start in molecules(folder, "displaced", most):
        exact = _minimum(start, ForASE(GFN2(start.numbers, 0, 0)))
        near = exact.copy()
        near.positions += random.normal(0, NOISE, near.positions.shape)
        for name, atoms in (("same_start", start), ("from_minimum", near)):
            found = _minimum(atoms, FAIRChemCalculator(unit, task_name="omol"))
            minimize_rotation_and_translation(exact, found)
            distances[name].append(float(np.sqrt(((found.positions - exact.positions) ** 2).sum(1).mean())))
    return {
        name: {
            "molecules": len(values),
            "median_rmsd": statistics.median(values),
            "largest_rmsd": max(values),
            "share_within_0.1": sum(distance < CLOSE_ENOUGH for distance in values) / len(values),
        }
        for name, values in distances.items()
    }


def _minimum(start: Atoms, calculator: Calculator) -> Atoms:
    atoms = start.copy()
    atoms.calc = calculator
    LBFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.01, steps=500)
    return atoms


def dynamics(checkpoint: Path, folder: Path, device: str, most: int = 20, steps: int = 40_000) -> dict[str, float]:
    """Velocity Verlet of all molecules in one batch; bonds and energies every hundredth step."""
    unit = load_predict_unit(str(checkpoint), inference_settings=STRICT, device=device)
    systems = list(molecules(folder, "relaxed", most))
    for seed, atoms in enumerate(systems):
        draw_velocities(atoms, KELVIN, seed)
    keys = {"task_name": "omol", "r_data_keys": ["spin", "charge"], "molecule_cell_size": 120}
    batch = atomicdata_list_to_batch([AtomicData.from_ase(atoms, **keys) for atoms in systems]).to(device)
    first = np.cumsum([0, *map(len, systems)])
    pairs = []
    for atoms, start in zip(systems, first, strict=False):
        radii = covalent_radii[atoms.numbers]
        bonded = np.triu(atoms.get_all_distances() < BONDED * (radii[:, None] + radii), 1)
        pairs.append(np.argwhere(bonded) + start)
    i, j = torch.from_numpy(np.concatenate(pairs).T).to(device)
    masses, velocities = (
        torch.from_numpy(np.concatenate([getattr(atoms, f"get_{name}")() for atoms in systems])).to(device)
        for name in ("masses", "velocities")
    )
    masses, positions, step = masses.unsqueeze(1), batch.pos.double(), STEP * units.fs

    def evaluate() -> tuple[torch.Tensor, torch.Tensor]:
        batch.pos = positions.float()
        found = unit.predict(batch.clone())
        return found["energy"].double().sum(), found["forces"].double()

    energy, forces = evaluate()
    lengths = (positions[i] - positions[j]).norm(dim=1)
    stretched, totals, begun = [1.0], [], time.perf_counter()
    for n in range(1, steps + 1):
        velocities += 0.5 * step * forces / masses
        positions = positions + step * velocities
        energy, forces = evaluate()
        velocities += 0.5 * step * forces / masses
        if n % 100 == 0 or n == steps:
            stretched.append(float(((positions[i] - positions[j]).norm(dim=1) / lengths).max()))
            totals.append(float(energy + 0.5 * (masses * velocities**2).sum()))
    elapsed = steps * STEP / 1000  # ps
    drift = np.polyfit(np.linspace(0, elapsed, len(totals)), totals, 1)[0] if len(totals) > 1 else 0.0
    return {
        "molecules": len(systems),
        "atoms": len(positions),
        "picoseconds": elapsed,
        "longest_bond_over_start": float(np.max(stretched)),
        "drift_mev_per_atom_ps": 1000 * float(drift) / len(positions),
        "ms_per_step": 1000 * (time.perf_counter() - begun) / steps,
    }


def speed(
    checkpoint: Path, device: str, waters: tuple[int, ...] = WATERS, settings: str | InferenceSettings = "default"
) -> dict[str, dict[str, float]]:
    """Milliseconds of energy and forces by number of atoms, median of five; GFN2-xTB up to 600 atoms."""
    unit = load_predict_unit(str(checkpoint), inference_settings=settings, device=device)
    rows = {}
    for count in waters:
        structure = water_cluster(np.random.default_rng(count), count)
        given = {"potential": FAIRChemCalculator(unit, task_name="omol")}
        if 3 * count <= 600 and importlib.util.find_spec("tblite"):
            given["gfn2"] = ForASE(GFN2(structure.numbers, 0, 0))
        row = {}
        for name, calculator in given.items():
            atoms = Atoms(structure.numbers, structure.positions, info={"charge": 0, "spin": 1})
            atoms.calc, times = calculator, []
            for _ in range(8):  # the first three compile, and capture CUDA graphs
                atoms.positions[0, 0] += 1e-3
                begun = time.perf_counter()
                atoms.get_forces()
                times.append(1000 * (time.perf_counter() - begun))
            row[name] = statistics.median(times[3:])
        rows[str(3 * count)] = row
    return rows


def main() -> None:
    """Print what was found, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a file, or gfn2-small")
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", default=[], help="of relax, dynamics, speed; all by default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=40_000, help="of dynamics")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.checkpoint = check_checkpoint_path(options.checkpoint)
    parts = {
        "relax": lambda: relax(options.checkpoint, options.folder, options.device),
        "dynamics": lambda: dynamics(options.checkpoint, options.folder, options.device, steps=options.steps),
        "speed": lambda: speed(options.checkpoint, options.device),
    }
    if unknown := set(options.parts) - set(parts):
        parser.error(f"parts: expected some of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    found: dict = {"device": device, "checkpoint": options.checkpoint.name}
    for name in options.parts or parts:
        found[name] = parts[name]()
        print(name, json.dumps(found[name]), flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
