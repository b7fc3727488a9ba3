"""Errors of a checkpoint on the test molecules of `make_gfn2`'s files, class by class, in strict float32.

    python benchmarks/gfn2/evaluate.py CHECKPOINT FOLDER [--output FILE.json] [--most 5000] [--device cuda]

Mean absolute errors against GFN2-xTB: energies in meV/atom, force components in meV/Å, beside them the mean absolute
force component, the error of predicting zero. --most: structures, evenly spread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

from e2former_fairchem.data.make_gfn2 import CLASSES
from e2former_fairchem.data.packed import PackedDataset
from e2former_fairchem.training.checkpoint import check_checkpoint_path

BATCH_ATOMS = 4096


def errors(checkpoint: Path, folder: Path, most: int, device: str) -> dict[str, dict[str, float]]:
    """By class and ``all``: structures, energy (meV/atom), forces and zero_forces (meV/Å)."""
    names = {"energy": "omol_energy", "forces": "omol_forces"}
    data = PackedDataset({"src": str(folder), "part": "test", "key_mapping": names})
    chosen = np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int))
    settings = InferenceSettings(tf32=False, activation_checkpointing=False, compile=False)
    unit = load_predict_unit(str(checkpoint), inference_settings=settings, device=device)
    natoms = data.get_metadata("natoms", chosen)
    groups = np.split(chosen, np.flatnonzero(np.diff(np.cumsum(natoms) // BATCH_ATOMS)) + 1)
    found: dict[str, list[np.ndarray]] = {"energy": [], "forces": [], "zero": []}
    for group in groups:
        structures = [data[int(n)] for n in group]
        said = unit.predict(atomicdata_list_to_batch(structures))
        atoms = torch.tensor([len(one.atomic_numbers) for one in structures])
        energy = said["energy"].detach().cpu().double().flatten() - torch.cat([one.omol_energy for one in structures])
        found["energy"].append((energy / atoms).abs().numpy())
        exact = torch.cat([one.omol_forces for one in structures])
        for key, values in (("forces", said["forces"].detach().cpu() - exact), ("zero", exact)):
            per_atom = values.double().abs().mean(1)
            found[key] += [part.mean().reshape(1).numpy() for part in per_atom.split(atoms.tolist())]
    energy, forces, zero = (np.concatenate(found[key]) for key in ("energy", "forces", "zero"))
    kinds = data.kinds()[chosen]
    rows = {}
    for name, there in [*((name, kinds == n) for n, name in enumerate(CLASSES)), ("all", kinds >= 0)]:
        if there.any():
            weight = natoms[there] / natoms[there].sum()  # every component counts once
            rows[name] = {
                "structures": int(there.sum()),
                "energy": 1000 * float(energy[there].mean()),
                "forces": 1000 * float((weight * forces[there]).sum()),
                "zero_forces": 1000 * float((weight * zero[there]).sum()),
            }
    return rows


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a file, or gfn2-small")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--most", type=int, default=5000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.checkpoint = check_checkpoint_path(options.checkpoint)
    rows = errors(options.checkpoint, options.folder, options.most, options.device)
    print("| class | structures | energy, meV/atom | forces, meV/Å | zero forces |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['structures']:,} | {row['energy']:.2f} | {row['forces']:.1f} | {row['zero_forces']:.0f} |"
        )
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
