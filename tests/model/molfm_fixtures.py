"""Reading the authors' reference arrays (see load_example.py beside them) as fairchem data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import AtomicData


@dataclass
class Fixture:
    """One file: metadata, weights, systems with their reference arrays."""

    name: str
    meta: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    systems: dict[str, dict[str, np.ndarray]]

    @property
    def release(self) -> str:
        return "v2" if self.meta["tree"] == "v2tag" else "v1.5"

    @property
    def outputs(self) -> str:
        return "out_validmax" if self.release == "v2" else "out"

    def config(self, conserving: bool) -> dict[str, Any]:
        with_moe = self.meta["with_moe"]
        return {
            **self.meta["backbone_config"],
            "with_moe": None if with_moe in (None, "None") else with_moe,
            "AutoGradForce": conserving,
            "dataset_name_list": self.meta["dataset"],
        }


def load_fixture(path: Path) -> Fixture:
    arrays = np.load(path)
    meta = json.loads(str(arrays["meta"]))
    state = {
        k.removeprefix("state_dict/"): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("state_dict/")
    }
    systems: dict[str, dict[str, np.ndarray]] = {}
    for key in arrays.files:
        if key.startswith("sys/"):
            _, name, rest = key.split("/", 2)
            systems.setdefault(name, {})[rest] = arrays[key]
    return Fixture(path.stem, meta, state, systems)


def lattice_offsets(system: dict[str, np.ndarray], edges: str = "edges") -> np.ndarray:
    """Integer offsets [E, 3] behind the file's edge vectors, vec = r_i - r_j - offset @ cell."""
    i, j, vec = (system[f"{edges}/{k}"] for k in ("i", "j", "vec"))
    shift = system["pos"][i] - system["pos"][j] - vec
    offsets = np.zeros_like(vec)
    for structure, cell in enumerate(system["cell"]):
        mask = system["batch"][i] == structure
        if system["pbc"][structure].any():
            offsets[mask] = np.linalg.solve(cell.T, shift[mask].T).T
    assert np.abs(offsets - offsets.round()).max(initial=0.0) < 1e-9
    return offsets.round()


def atomic_data(system: dict[str, np.ndarray], dtype: torch.dtype, with_edges: bool = False) -> AtomicData:
    """The system as a batch; with_edges: with the file's own edges (source first)."""
    batch = torch.from_numpy(system["batch"])
    natoms = torch.bincount(batch)
    num_systems = natoms.numel()
    if with_edges:
        edge_index = torch.from_numpy(np.stack([system["edges/j"], system["edges/i"]]))
        offsets = torch.from_numpy(lattice_offsets(system)).to(dtype)
        nedges = torch.bincount(batch[edge_index[1]], minlength=num_systems)
    else:
        edge_index = torch.empty(2, 0, dtype=torch.long)
        offsets = torch.empty(0, 3, dtype=dtype)
        nedges = torch.zeros(num_systems, dtype=torch.long)
    cell = torch.from_numpy(system["cell"]).to(dtype)
    return AtomicData(
        pos=torch.from_numpy(system["pos"]).to(dtype),
        atomic_numbers=torch.from_numpy(system["atomic_numbers"]).long(),
        cell=cell,
        pbc=torch.from_numpy(system["pbc"]),
        natoms=natoms,
        edge_index=edge_index,
        cell_offsets=offsets,
        nedges=nedges,
        charge=torch.from_numpy(system["charge"]),
        spin=torch.from_numpy(system["multiplicity"]),
        fixed=torch.zeros(batch.numel(), dtype=torch.long),
        tags=torch.zeros(batch.numel(), dtype=torch.long),
        batch=batch,
        sid=["x"] * num_systems,
        dataset=["omol"] * num_systems,
    )
