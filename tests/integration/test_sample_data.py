"""The bundled sample: what fairchem reads from it, how it was split, and that the script makes it."""

from __future__ import annotations

import filecmp
import json
import os
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from fairchem.core.datasets.mt_concat_dataset import create_concat_dataset
from omegaconf import OmegaConf

from e2former_fairchem.data import make_sample
from e2former_fairchem.data.in_memory import create_in_memory_dataset
from e2former_fairchem.training import resolvers

PARTS = {"train": 601, "val_known": 60, "val_new": 75}


def rows(part: str) -> list:
    with connect(str(Path(resolvers.sample(part)) / "data.aselmdb"), readonly=True, use_lock_file=False) as db:
        return list(db.select())


def dataset_configs(**splits: str) -> dict:
    config = {
        "splits": {name: {"src": str(src)} for name, src in splits.items()},
        "format": "ase_db",
        "a2g_args": {"r_energy": True, "r_forces": True, "r_data_keys": ["spin", "charge"]},
        "key_mapping": {"energy": "omol_energy", "forces": "omol_forces"},
        "transforms": {"common_transform": {"dataset_name": "omol"}},
    }
    return OmegaConf.create({"omol": config})


@pytest.mark.parametrize("part", PARTS)
def test_fairchem_reads_energy_forces_charge_and_spin(part: str) -> None:
    sampling = {"sampling": {"type": "explicit", "ratios": {f"omol.{part}": 1.0}}}
    data = create_concat_dataset(dataset_configs(**{part: resolvers.sample(part)}), sampling)
    assert len(data) == PARTS[part]
    by_id = {row.data["source"]: row for row in rows(part)}
    assert len(by_id) == PARTS[part]
    natoms = data.get_metadata("natoms", list(range(len(data))))
    for i in range(0, len(data), 7):
        item = data[i]
        assert item.natoms.item() == natoms[i]
        assert not item.pbc.any()
        atoms = data.datasets[0].dataset.get_atoms(data.datasets[0].indices[i])
        row = by_id[atoms.info["source"]]
        assert (item.charge.item(), item.spin.item()) == (row.data["charge"], row.data["spin"])
        assert item.omol_energy.item() == pytest.approx(row.energy, rel=1e-7)
        np.testing.assert_allclose(item.omol_forces.numpy(), row.forces, atol=1e-5)
        assert abs(item.omol_forces.sum(0)).max() < 1e-3


def test_held_out_molecules_are_never_trained_on() -> None:
    names = {part: {row.data["source"].split("/")[1] for row in rows(part)} for part in PARTS}
    assert names["val_new"] == set(make_sample.HELD_OUT_MOLECULES)
    assert not names["val_new"] & (names["train"] | names["val_known"])
    # compositions may occur again (acetone has isomers); no structure does
    sources = [row.data["source"] for part in PARTS for row in rows(part)]
    assert len(set(sources)) == sum(PARTS.values())


def test_known_structures_are_of_trained_species() -> None:
    trained = {row.data["source"].rsplit("/", 1)[0] for row in rows("train")}
    assert {row.data["source"].rsplit("/", 1)[0] for row in rows("val_known")} <= trained


def test_statistics_belong_to_the_data() -> None:
    statistics = json.loads((resolvers.DATA / "sample" / "statistics.json").read_text())
    assert statistics["num_structures"] == PARTS
    references = np.array(statistics["element_references"])
    train = rows("train")
    charges = np.array([row.data["charge"] for row in train])
    residual = np.array([row.energy - references[row.numbers].sum() for row in train]) - charges * references[0]
    counts = np.stack([np.bincount(row.numbers, minlength=len(references)) for row in train])
    counts[:, 0] = charges
    # least squares: the residual is orthogonal to every element's counts, and to the charges
    assert np.abs(counts.T @ residual).max() < 1e-2
    assert np.sqrt(np.mean(residual**2)) == pytest.approx(statistics["energy_residual_rms"], abs=1e-5)
    for part in PARTS:
        forces = np.concatenate([row.forces for row in rows(part)])
        assert np.abs(forces).mean() == pytest.approx(statistics["zero_force_mae"][part], abs=1e-5)


def test_the_script_makes_the_sample_byte_for_byte(tmp_path: Path, repo: Path) -> None:
    source = Path(os.environ.get("E2FORMER_SAMPLE_XYZ", repo.parent / "shared" / "data" / "wb97mv_small.xyz"))
    if not source.is_file():
        pytest.skip(f"no {source}; name the file in E2FORMER_SAMPLE_XYZ")
    make_sample.main([str(source), str(tmp_path / "again")])
    bundled = resolvers.DATA / "sample"
    files = [str(p.relative_to(bundled)) for p in bundled.rglob("*") if p.is_file()]
    assert len(files) == 7
    _, different, missing = filecmp.cmpfiles(bundled, tmp_path / "again", files, shallow=False)
    assert (different, missing) == ([], [])


def frames(n: int, molecule: str = "H2") -> list[Atoms]:
    out = []
    for i in range(n):
        atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74 + 0.01 * i]])
        atoms.info = {"charge": 0, "spin": 1, "source": f"m/{molecule}/q0/m1/{i}", "data_id": "m", "num_atoms": 2}
        atoms.calc = SinglePointCalculator(atoms, energy=-31.0 - i, forces=np.zeros((2, 3)))
        out.append(atoms)
    return out


def test_existing_data_is_not_overwritten(tmp_path: Path) -> None:
    make_sample.write_folder(frames(2), tmp_path)
    before = (tmp_path / "data.aselmdb").read_bytes()
    with pytest.raises(FileExistsError, match="remove it first"):
        make_sample.write_folder(frames(3), tmp_path)
    assert (tmp_path / "data.aselmdb").read_bytes() == before


def test_frames_without_labels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.xyz"
    ase.io.write(path, Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]], info={"charge": 0}), format="extxyz")
    with pytest.raises(ValueError, match=r"frame 0: expected the keys spin, source, data_id, REF_energy, REF_forces"):
        make_sample.read_frames(path)


def test_unknown_held_out_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"held_out: .* got \['water'\]"):
        make_sample.split(frames(5), held_out=["water"], num_val_known=1)


def test_in_memory_data_is_fairchems_data_decoded_once() -> None:
    configs = dataset_configs(val_known=resolvers.sample("val_known"))
    sampling = {"sampling": {"type": "explicit", "ratios": {"omol.val_known": 1.0}}}
    plain, kept = create_concat_dataset(configs, sampling), create_in_memory_dataset(configs, sampling)
    assert len(plain) == len(kept)
    for i in (0, 17, 59):
        a, b = plain[i], kept[i]
        assert a.keys() == b.keys()
        for key in a.keys():  # noqa: SIM118  (AtomicData iterates over pairs)
            same = torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
            assert same, key
    assert kept[17].pos is kept[17].pos
    assert plain[17].pos is not plain[17].pos
    assert kept.get_metadata("natoms", [0, 1]).tolist() == plain.get_metadata("natoms", [0, 1]).tolist()
