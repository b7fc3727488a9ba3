"""Errors of a checkpoint on the sample's held-out structures, molecule by molecule, as JSON.

    python benchmarks/quickstart/molecules.py CHECKPOINT OUTPUT.json [cpu|cuda]

A molecule is a name with charge and multiplicity, as in the rows' `source`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from fairchem.core import FAIRChemCalculator
from fairchem.core.datasets.ase_datasets import AseDBDataset
from omegaconf import DictConfig

import e2former_fairchem


def errors(calculator: FAIRChemCalculator, folder: Path) -> dict[str, dict[str, float]]:
    """For each molecule: structures, error of the energy (meV/atom), its sign kept in `bias`, and of forces (eV/Å)."""
    dataset = AseDBDataset(DictConfig({"src": str(folder)}))
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index in range(len(dataset)):
        atoms = dataset.get_atoms(index)
        label = atoms.calc.results
        atoms.calc = calculator
        energy = 1000 * (atoms.get_potential_energy() - label["energy"]) / len(atoms)
        force = float(np.abs(atoms.get_forces() - label["forces"]).mean())
        _, name, charge, spin, _ = str(atoms.info["source"]).split("/")
        found[f"{name} {charge} {spin}"].append((energy, force))
    return {
        name: {
            "structures": len(rows),
            "energy_mev_per_atom": float(np.abs([energy for energy, _ in rows]).mean()),
            "bias_mev_per_atom": float(np.mean([energy for energy, _ in rows])),
            "force_mae": float(np.mean([force for _, force in rows])),
        }
        for name, rows in sorted(found.items())
    }


def main(checkpoint: str, output: str, device: str = "cpu") -> None:
    """Write the errors of both held-out sets."""
    torch.set_num_threads(1)
    calculator = FAIRChemCalculator.from_model_checkpoint(
        checkpoint, task_name="omol", inference_settings="traineval", device=device
    )
    sample = Path(e2former_fairchem.__file__).parent / "data" / "sample"
    found = {name: errors(calculator, sample / name) for name in ("val_known", "val_new")}
    Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
