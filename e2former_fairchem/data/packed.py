"""Structures that stand one after the other in a few arrays, as `e2former_fairchem.data.make_gfn2` writes them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.datasets.base_dataset import BaseDataset

PARTS = ("train", "val", "test")
_ARRAYS = ("natoms", "numbers", "positions", "forces", "energy", "charge", "spin", "kind", "test")
#: Of the structures that are not for tests, every so many validates.
VALIDATION_EVERY = 200


@registry.register_dataset("e2former_packed")
class PackedDataset(BaseDataset[AtomicData]):
    """Molecules of ``.npz`` files in memory, for configs: `format: e2former_fairchem.data.packed.PackedDataset`.

    A file holds natoms [n], numbers [N], positions [N, 3] (Å), forces [N, 3] (eV/Å), energy [n] (eV), charge [n] (e),
    spin [n] (multiplicity), kind [n] (class) and test [n] of its n structures and their N atoms.

    Args:
        config: ``src``: folder of the files, or several; ``part``: of PARTS; ``key_mapping``: names of the labels.
            Split into train and validation is by number, every two hundredth.

    Raises:
        FileNotFoundError: no files.
        ValueError: another part, or a file without one of the arrays.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.part = config.get("part", "train")
        if self.part not in PARTS:
            raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {self.part!r}")
        names = config.get("key_mapping") or {}
        self._energy, self._forces = names.get("energy", "energy"), names.get("forces", "forces")
        arrays = read(self.paths)
        chosen = arrays["test"].astype(bool)
        if self.part != "test":
            number = np.cumsum(~chosen) - 1
            validates = (number % VALIDATION_EVERY == 0) & ~chosen
            chosen = validates if self.part == "val" else ~chosen & ~validates
        self._first = np.concatenate([[0], np.cumsum(arrays["natoms"], dtype=np.int64)])
        self._arrays, self._chosen = arrays, np.flatnonzero(chosen)
        self.num_samples = len(self._chosen)

    @cached_property
    def _metadata(self) -> dict[str, np.ndarray]:
        return {"natoms": self._arrays["natoms"][self._chosen].astype(np.int64)}

    def kinds(self) -> np.ndarray:
        """Class of every structure, by its number in `make_gfn2.CLASSES`."""
        return self._arrays["kind"][self._chosen]

    def __getitem__(self, idx: int) -> AtomicData:
        """Structure ``idx`` as fairchem's batches want it."""
        number = int(self._chosen[idx])
        rows, arrays = slice(int(self._first[number]), int(self._first[number + 1])), self._arrays
        atomic_numbers = torch.from_numpy(arrays["numbers"][rows].astype(np.int64))
        zeros = torch.zeros_like(atomic_numbers)
        data = AtomicData(
            pos=torch.from_numpy(arrays["positions"][rows].copy()),
            atomic_numbers=atomic_numbers,
            cell=torch.zeros(1, 3, 3),
            pbc=torch.zeros(1, 3, dtype=torch.bool),
            natoms=torch.tensor([len(atomic_numbers)]),
            edge_index=torch.empty(2, 0, dtype=torch.long),
            cell_offsets=torch.empty(0, 3),
            nedges=torch.tensor([0]),
            charge=torch.tensor([int(arrays["charge"][number])]),
            spin=torch.tensor([int(arrays["spin"][number])]),
            fixed=zeros,
            tags=zeros.clone(),
            sid=str(number),
            dataset="omol",
        )
        # fairchem wants what is called energy in the positions' dtype, which costs some 1e-4 eV
        dtype = data.pos.dtype if self._energy == "energy" else torch.float64
        setattr(data, self._energy, torch.tensor([float(arrays["energy"][number])], dtype=dtype))
        setattr(data, self._forces, torch.from_numpy(arrays["forces"][rows].copy()))
        return data


def read(folders: list[Path] | tuple[Path, ...]) -> dict[str, np.ndarray]:
    """All files of the folders, by name, as one.

    Raises:
        As `PackedDataset`.
    """
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.npz"))]
    if not files:
        raise FileNotFoundError(f"src: expected a folder with .npz files, got {', '.join(map(str, folders))}")
    parts = []
    for file in files:
        with np.load(file) as content:
            if missing := [name for name in _ARRAYS if name not in content]:
                raise ValueError(f"{file}: expected the arrays {', '.join(_ARRAYS)}, got none named {missing[0]}")
            parts.append({name: content[name] for name in _ARRAYS})
    return {name: np.concatenate([part[name] for part in parts]) for name in _ARRAYS}
