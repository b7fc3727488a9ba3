"""`Data` and `Batch` of PyTorch Geometric: into fairchem's `AtomicData` and back."""

from __future__ import annotations

from collections.abc import Callable

import ase
import pytest
import torch
from torch_geometric.data import Batch, Data

from e2former_fairchem.interop.pyg import from_pyg, to_pyg


def data_of(atoms: ase.Atoms, dtype: torch.dtype = torch.float64, **more: object) -> Data:
    """As somebody's data set has it: numbers are `z`, forces `force`."""
    periodic = {"cell": torch.tensor(atoms.cell.array, dtype=dtype), "pbc": torch.tensor(atoms.pbc)}
    return Data(
        z=torch.tensor(atoms.numbers),
        pos=torch.tensor(atoms.positions, dtype=dtype),
        charge=torch.tensor([atoms.info["charge"]]),
        spin=atoms.info["spin"],
        **(periodic if atoms.pbc.any() else {}) | more,
    )


def test_a_model_sees_the_same(structures: dict, batch_of: Callable, build: Callable) -> None:
    """Energies and forces from a `Batch` are those of fairchem's own way from `Atoms`, bit by bit."""
    ours = [structures[name] for name in ("ammonia", "water")]
    batch = from_pyg(Batch.from_data_list([data_of(atoms) for atoms in ours]), "omol")
    model = build()
    got, wanted = model(batch), model(batch_of(*ours))
    for key in ("energy", "forces"):
        assert torch.equal(got[key][key], wanted[key][key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(structures: dict, dtype: torch.dtype) -> None:
    crystals = [structures["crystal"], structures["slab"]]
    labels = [
        {
            "energy": -1.5 * len(a),
            "force": torch.randn(len(a), 3, dtype=dtype),
            "stress": torch.randn(3, 3, dtype=dtype),
        }
        for a in crystals
    ]
    given = Batch.from_data_list([data_of(a, dtype, **more) for a, more in zip(crystals, labels, strict=True)])
    back = to_pyg(from_pyg(given, "omol"))
    assert isinstance(back, Batch) and back.num_graphs == 2
    for one, atoms, label in zip(back.to_data_list(), crystals, labels, strict=True):
        wanted = data_of(atoms, dtype)
        assert torch.equal(one.pos, wanted.pos) and one.pos.dtype == one.cell.dtype == one.energy.dtype == dtype
        assert torch.equal(one.z, wanted.z) and torch.equal(one.cell[0], wanted.cell)
        assert one.pbc[0].tolist() == atoms.pbc.tolist() and one.spin.tolist() == [1]
        assert torch.equal(one.forces, label["force"]) and torch.equal(one.stress[0], label["stress"])
        assert one.energy.item() == label["energy"]
    again = to_pyg(from_pyg(back, "omol"))
    assert sorted(again.keys()) == sorted(back.keys())
    assert all(torch.equal(again[key], back[key]) for key in back.keys())  # noqa: SIM118, a Data iterates over pairs


def test_gradients_and_defaults(structures: dict) -> None:
    data = data_of(structures["water"])
    data.pos.requires_grad_()
    del data.charge, data.spin
    made = from_pyg(data, "omol")
    made.pos.sum().backward()
    assert data.pos.grad.eq(1).all()
    assert made.charge.tolist() == made.spin.tolist() == [0] and not made.pbc.any() and made.dataset == ["omol"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pos": None}, r"pos: expected \[N, 3\] in float32 or float64, got nothing"),
        ({"pos": torch.zeros(3, 3).half()}, r"pos: expected .* got \[3, 3\] torch.float16"),
        ({"z": None}, r"z: expected atomic numbers \[3\], got nothing"),
        ({"z": torch.tensor([8, 1])}, r"z: expected shape \[3\], got \[2\]"),
        (
            {"atomic_numbers": torch.tensor([8, 1, 1])},
            "atomic_numbers: expected one of z, atomic_numbers, got z and atom",
        ),
        ({"charge": 0.5}, "charge: expected values of torch.int64, got 0.5"),
        ({"cell": torch.eye(3)}, "cell, pbc: expected both or neither"),
        ({"energy": torch.zeros(19)}, r"energy: expected shape \[1\], got \[19\]"),
    ],
)
def test_wrong_data(structures: dict, changed: dict, message: str) -> None:
    data = data_of(structures["water"])
    for key, value in changed.items():
        data[key] = value
    with pytest.raises(ValueError, match=message):
        from_pyg(data, "omol")
