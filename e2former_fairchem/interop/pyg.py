"""PyTorch Geometric's `Data` and `Batch` to fairchem's `AtomicData`, and back."""

from __future__ import annotations

from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from torch_geometric.data import Batch, Data

#: Names in a `Data` by fairchem's names: PyG's data sets call numbers `z`, MD17 calls forces `force`.
NAMES = {"atomic_numbers": ("z", "atomic_numbers"), "forces": ("forces", "force")}


def _read(data: Data, key: str, shape: tuple[int, ...], dtype: torch.dtype, default: float | None = None) -> Any:
    """The tensor of a key as `shape` (a leading 1 may be missing) and `dtype`; without it the default in that shape."""
    names = NAMES.get(key, (key,))
    found = [name for name in names if data.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"{key}: expected one of {', '.join(names)}, got {' and '.join(found)}")
    if not found:
        return None if default is None else torch.full(shape, default, dtype=dtype, device=data.pos.device)
    value = torch.as_tensor(data[found[0]], device=data.pos.device)
    if tuple(value.shape) not in (shape, shape[shape[0] == 1 :]):
        raise ValueError(f"{found[0]}: expected shape {list(shape)}, got {list(value.shape)}")
    if not dtype.is_floating_point and not torch.equal(value.to(dtype).to(value.dtype), value):
        raise ValueError(f"{found[0]}: expected values of {dtype}, got {value.tolist()}")
    return value.reshape(shape).to(dtype)


def from_pyg(data: Data, task_name: str) -> AtomicData:
    """A structure, or a `Batch` of them, as fairchem's models and predict units take it.

    Edges are left out, because the network finds neighbours within its own cutoff, and so is whatever else a `Data`
    holds. Gradients pass from the result's positions to those given.

    Args:
        data: with `pos` [N, 3], Å, float32 or float64, which sets the dtype of the rest, and `z` or `atomic_numbers`
            [N]. Optional: `cell` [3, 3] (rows are lattice vectors, Å) with `pbc` [3]; `charge` (e) and `spin`
            (multiplicity 2S+1), without them 0, which for spin is fairchem's "not given"; `energy` (eV), `forces` or
            `force` [N, 3] (eV/Å), `stress` [3, 3] (eV/Å³); `tags` and `fixed` [N].
        task_name: data set of the checkpoint whose tasks are meant, as `omol`.

    Returns:
        One structure, or a batch where a `Batch` was given, on the device of `data`.

    Raises:
        ValueError: something is missing, has another shape or type, or is given twice.
    """
    if isinstance(data, Batch):
        return atomicdata_list_to_batch([from_pyg(one, task_name) for one in data.to_data_list()])
    pos = data.pos
    if pos is None or pos.dim() != 2 or pos.shape[1] != 3 or pos.dtype not in (torch.float32, torch.float64):
        got = "nothing" if pos is None else f"{list(pos.shape)} {pos.dtype}"
        raise ValueError(f"pos: expected [N, 3] in float32 or float64, got {got}")
    atoms, dtype = len(pos), pos.dtype
    numbers = _read(data, "atomic_numbers", (atoms,), torch.long)
    if numbers is None:
        raise ValueError(f"z: expected atomic numbers [{atoms}], got nothing")
    if (data.get("cell") is None) != (data.get("pbc") is None):
        raise ValueError("cell, pbc: expected both or neither, got one of them")
    cell = _read(data, "cell", (1, 3, 3), dtype)
    labels = {"energy": (1,), "forces": (atoms, 3), "stress": (1, 3, 3)}
    count = torch.tensor([atoms], device=pos.device)
    return AtomicData(
        pos=pos,
        atomic_numbers=numbers,
        cell=torch.eye(3).to(pos).unsqueeze(0) if cell is None else cell,  # fairchem's for an open structure
        pbc=_read(data, "pbc", (1, 3), torch.bool, False),
        natoms=count,
        edge_index=numbers.new_empty((2, 0)),
        cell_offsets=pos.new_empty((0, 3)),
        nedges=torch.zeros_like(count),
        charge=_read(data, "charge", (1,), torch.long, 0),
        spin=_read(data, "spin", (1,), torch.long, 0),
        fixed=_read(data, "fixed", (atoms,), torch.long, 0),
        tags=_read(data, "tags", (atoms,), torch.long, 0),
        dataset=task_name,
        **{key: _read(data, key, shape, dtype) for key, shape in labels.items()},
    )


def to_pyg(data: AtomicData) -> Data:
    """The inverse of `from_pyg`, without edges and the task's name.

    Args:
        data: one structure, or a batch that fairchem's collater made.

    Returns:
        A `Data`, or a `Batch` of several structures, with `z` and the names and shapes of `from_pyg`.
    """
    if data.num_graphs > 1:
        return Batch.from_data_list([to_pyg(one) for one in data.batch_to_atomicdata_list()])
    keys = ("pos", "cell", "pbc", "charge", "spin", "fixed", "tags", "energy", "forces", "stress")
    return Data(z=data.atomic_numbers, **{key: data[key] for key in keys if key in data})
