"""Small structures, and ASE structures as fairchem batches without wrapping or rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from fairchem.core.datasets.atomic_data import AtomicData


def atomic_data(structures: Sequence[Atoms], dtype: torch.dtype, dataset: str = "omol") -> AtomicData:
    """A batch of structures, positions (Å) and cells as they are, no edges.

    Charge and multiplicity come from ``atoms.info`` (``charge``, default 0; ``spin``, default 1).
    """
    natoms = torch.tensor([len(a) for a in structures])
    count = int(natoms.sum())
    return AtomicData(
        pos=torch.tensor(np.concatenate([a.positions for a in structures]), dtype=dtype),
        atomic_numbers=torch.tensor(np.concatenate([a.numbers for a in structures])),
        cell=torch.tensor(np.stack([a.cell.array for a in structures]), dtype=dtype),
        pbc=torch.tensor(np.stack([a.pbc for a in structures])),
        natoms=natoms,
        edge_index=torch.empty(2, 0, dtype=torch.long),
        cell_offsets=torch.empty(0, 3, dtype=dtype),
        nedges=torch.zeros(len(structures), dtype=torch.long),
        charge=torch.tensor([int(a.info.get("charge", 0)) for a in structures]),
        spin=torch.tensor([int(a.info.get("spin", 1)) for a in structures]),
        fixed=torch.zeros(count, dtype=torch.long),
        tags=torch.zeros(count, dtype=torch.long),
        batch=torch.repeat_interleave(torch.arange(len(structures)), natoms),
        sid=[str(n) for n in range(len(structures))],
        dataset=[dataset] * len(structures),
    )


def random_molecule(name: str = "CH3CH2OH", seed: int = 0, displacement: float = 0.05) -> Atoms:
    """A molecule of ASE's g2 set, displaced at random (standard deviation in Å)."""
    atoms = molecule(name)
    atoms.positions += np.random.default_rng(seed).normal(0, displacement, atoms.positions.shape)
    atoms.info.update(charge=0, spin=1)
    return atoms


def water_box(seed: int = 0, pbc: bool | Sequence[bool] = True) -> Atoms:
    """Two waters in a small skewed box (about 5 Å): an atom sees several images of its neighbours."""
    rng = np.random.default_rng(seed)
    atoms = molecule("H2O") + molecule("H2O")
    atoms.positions[3:] += [2.3, 1.9, 1.1]
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    atoms.cell = [[4.7, 0.2, 0.0], [0.5, 5.1, 0.3], [-0.4, 0.6, 4.9]]
    atoms.pbc = pbc
    atoms.info.update(charge=0, spin=1)
    return atoms


def random_rotation(seed: int = 0) -> np.ndarray:
    """A random proper rotation matrix [3, 3]."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))
