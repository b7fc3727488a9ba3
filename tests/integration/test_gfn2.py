"""Structures with GFN2-xTB labels: made, read as a data set, and trained on."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.data import chemical_symbols

from e2former_fairchem.data import make_gfn2
from e2former_fairchem.data.make_sample import HELD_OUT_MOLECULES
from e2former_fairchem.data.packed import PackedDataset
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import read_checkpoint

missing = [name for name in ("rdkit", "tblite") if importlib.util.find_spec(name) is None]
needs_data = pytest.mark.skipif(bool(missing), reason=f"needs the extra data ({', '.join(missing)})")
SMILES = ("CO", "N", "OC=O", "C=C")


def packed(folder: Path, count: int = 40) -> Path:
    """A folder with made-up structures of water and hydrogen."""
    random, folder = np.random.default_rng(0), folder / "packed"
    folder.mkdir()
    for name, size in (("a", count // 2), ("b", count - count // 2)):
        natoms = random.choice([2, 3], size)
        numbers = np.concatenate([[8, 1, 1] if n == 3 else [1, 1] for n in natoms])
        energy = np.array([-140.0 if n == 3 else -26.0 for n in natoms]) + random.normal(size=size)
        positions = np.concatenate([[[0, 0, 0], [0, 0.8, 0.5], [0, -0.8, 0.5]][:n] for n in natoms])
        arrays = {"natoms": natoms.astype(np.int16), "numbers": numbers.astype(np.uint8), "energy": energy}
        arrays |= {"positions": (positions + random.normal(0, 0.05, positions.shape)).astype(np.float32)}
        arrays |= {"forces": random.normal(size=positions.shape).astype(np.float32)}
        arrays["charge"], arrays["kind"] = np.zeros(size, np.int8), make_gfn2.CLASSES.index("relaxed") * (natoms == 3)
        arrays |= {"spin": np.ones(size, np.int8), "test": (np.arange(size) % 5 == 4).astype(np.uint8)}
        np.savez_compressed(folder / f"{name}.npz", **arrays)
    references = {"element_references": make_gfn2.fit_references(folder), "unit": "eV"}
    (folder / "references.json").write_text(json.dumps(references))
    return folder


@needs_data
def test_structures_of_molecules(tmp_path: Path) -> None:
    """Every class is there, twice the same; forces are the energy's derivatives; charges and electrons fit."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        counts = make_gfn2.write(tmp_path / name, make_gfn2.Job("molecules", SMILES[:2]))
    with np.load(tmp_path / "one" / "molecules.npz") as one, np.load(tmp_path / "two" / "molecules.npz") as two:
        assert all(np.array_equal(one[key], two[key]) for key in one)
        content = {key: one[key] for key in one}
    assert {name for name, counter in counts.items() if counter["kept"]} >= {
        "displaced",
        "dynamics",
        "stretched",
        "dimer",
        "ion",
        "radical",
    }
    ends = np.cumsum(content["natoms"].astype(int))
    for number in range(0, len(ends), 7):
        rows = slice(ends[number] - content["natoms"][number], ends[number])
        numbers = content["numbers"][rows].astype(int)
        electrons = numbers.sum() - int(content["charge"][number])
        assert (electrons - int(content["spin"][number]) + 1) % 2 == 0, [chemical_symbols[z] for z in numbers]
    relaxed = np.flatnonzero(content["kind"] == make_gfn2.CLASSES.index("relaxed"))
    forces = [np.abs(content["forces"][ends[n] - content["natoms"][n] : ends[n]]).max() for n in relaxed]
    assert forces[0] > 0.2 and min(forces) < 0.02, "to a minimum"
    rows, h = slice(ends[0] - content["natoms"][0], ends[0]), 1e-3
    method = make_gfn2.GFN2(content["numbers"][rows].astype(int), 0, 0)
    positions = content["positions"][rows].astype(float)
    step = np.zeros_like(positions)
    step[0, 1] = h
    slope = (method(positions + step).energy - method(positions - step).energy) / (2 * h)
    assert content["forces"][rows][0, 1] == pytest.approx(-slope, abs=2e-3)
    assert content["energy"][0] == pytest.approx(method(positions).energy, abs=1e-3)


@needs_data
def test_molecules_of_val_new_are_left_out() -> None:
    """Those that the sample keeps, by their elements; in other charges, too; and the radical that is one of them."""
    from rdkit import Chem

    kept = []
    for smiles in make_gfn2.VAL_NEW:
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        kept.append(Atoms([atom.GetSymbol() for atom in mol.GetAtoms()]).get_chemical_formula())
    names = [name.replace("Formic_acid_dimer", "HCOOH") for name in HELD_OUT_MOLECULES]
    assert sorted(kept) == sorted(molecule(name).get_chemical_formula() for name in names)
    for smiles in ("O=C[O-]", "c1cc[nH+]cc1", "CCO"):
        with pytest.raises(ValueError, match="kept for val_new"):
            make_gfn2.Molecule(smiles)
    assert not list(make_gfn2._radicals(make_gfn2.Molecule("C=O")))


@needs_data
def test_fragments() -> None:
    """What single bonds outside rings leave, each once; as radical, cation and anion; none of val_new."""
    parts = make_gfn2.pieces(["CCO", "OCC", "CC=O", "c1ccccc1O", "C1CC1", "O=CO"])
    radicals = ["[OH]", "[CH3]", "[CH2]C", "[CH2]O", "[CH]=O", "[c]1ccccc1"]
    assert [part for part in parts if "[" in part] == radicals
    assert [part for part in parts if "[" not in part] == ["C", "O", "CC", "CO", "C=O", "c1ccccc1"]
    made = [
        structure for structure, label, _ in make_gfn2.fragments(["[CH3]", "[CH]=O", "[Cl]", "O"]) if label is not None
    ]
    assert {(len(s.numbers), s.charge, s.unpaired) for s in made} == {
        (n, charge, int((charge == 0) == (n != 3))) for n in (4, 1, 3) for charge in (-1, 0, 1)
    }
    assert all(s.kind == "fragment" for s in made) and sum(len(s.numbers) == 4 for s in made) > 15


@needs_data
def test_command_goes_on_where_it_was(tmp_path: Path) -> None:
    """All files are there but that of the molecules; a molecule's stands for the others, which take minutes each."""
    (tmp_path / "list.smi").write_text("O\n")
    folder = tmp_path / "out"
    folder.mkdir()
    make_gfn2.write(folder, make_gfn2.Job("pairs", ("O",)))
    for n in range(make_gfn2.WATER_FILES):
        shutil.copy(folder / "pairs.npz", folder / f"water_{n:04d}.npz")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    call = [str(tmp_path / "list.smi"), str(folder), "--workers", "0"]
    make_gfn2.main(call)
    assert {*folder.iterdir()} - {*before} == {folder / "molecules_0000.npz", folder / "references.json"}
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert set(json.loads((folder / "references.json").read_text())["element_references"]) == {"1", "8"}
    for n in range(make_gfn2.WATER_FILES):
        shutil.copy(folder / "pairs.npz", folder / f"water_{n:04d}_draw_1.npz")
    make_gfn2.main([*call, "--draw", "1"])
    with np.load(folder / "molecules_0000.npz") as one, np.load(folder / "molecules_0000_draw_1.npz") as two:
        assert np.array_equal(one["numbers"][:3], two["numbers"][:3])
        assert not np.isclose(one["positions"][:3], two["positions"][:3]).all(), "other random numbers"


def test_data_set(tmp_path: Path) -> None:
    """Parts are disjoint and complete; labels stand under their names; what is wrong is named."""
    folder = packed(tmp_path)
    names = {"energy": "omol_energy", "forces": "omol_forces"}
    parts = {
        part: PackedDataset({"src": str(folder), "part": part, "key_mapping": names})
        for part in ("train", "val", "test")
    }
    numbers = [data.sid[0] for part in parts.values() for data in (part[i] for i in range(len(part)))]
    assert sorted(map(int, numbers)) == list(range(40)) and len(parts["test"]) == 8 and len(parts["val"]) == 1
    data = parts["train"][3]
    assert data.omol_forces.shape == data.pos.shape and float(data.omol_energy) < -20
    assert parts["train"].get_metadata("natoms", 3) == len(data.atomic_numbers)
    with pytest.raises(ValueError, match="part: expected one of train, val, test, got 'all'"):
        PackedDataset({"src": str(folder), "part": "all"})
    with pytest.raises(FileNotFoundError, match="src: expected a folder with .npz files"):
        PackedDataset({"src": str(tmp_path / "nowhere")})
    np.savez_compressed(folder / "c.npz", natoms=np.array([1]))
    with pytest.raises(ValueError, match="got none named numbers"):
        PackedDataset({"src": str(folder)})


@pytest.mark.slow
def test_training(
    repo: Path, launch: Callable, tiny: Sequence[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through fairchem's command line, resumed as well, and the benchmarks after it."""
    folder = packed(elsewhere)
    short = ("steps=2", "batch_size=4", "runner.evaluate_every_n_steps=2", "job.run_dir=run", f"gfn2={folder}")
    launch(repo / "configs" / "train" / "gfn2_small.yaml", *tiny, *short)
    (final,) = elsewhere.glob("run/*/checkpoints/final/resume.yaml")
    launch(final, "runner.max_steps=3")
    assert (elsewhere / "run" / "inference_ckpt.pt").is_file()
    monkeypatch.syspath_prepend(repo / "benchmarks" / "gfn2")
    evaluate, properties = importlib.import_module("evaluate"), importlib.import_module("properties")
    checkpoint = elsewhere / "run" / "inference_ckpt.pt"
    rows = evaluate.errors(checkpoint, folder, 6, "cpu")
    assert set(rows) == {"displaced", "relaxed", "all"} and rows["all"]["structures"] == 6
    assert 0 < rows["all"]["energy"] < 1e5 and rows["all"]["zero_forces"] == pytest.approx(800, rel=0.5)
    (elsewhere / "errors.json").write_text(json.dumps(rows))
    bundled = importlib.import_module("bundle").bundle(checkpoint, elsewhere / "errors.json", elsewhere / "mine.pt")
    card = read_card(read_checkpoint(bundled))
    assert card["licence"] == "MIT" and bundled.stat().st_size < 0.7 * checkpoint.stat().st_size
    errors = card["validation"]["molecules that training has not seen"]
    assert errors == {key: pytest.approx(rows["all"][key] / 1000) for key in ("energy", "forces")}
    assert evaluate.errors(bundled, folder, 6, "cpu") == rows
    moved = properties.dynamics(checkpoint, folder, "cpu", steps=3)
    assert moved["molecules"] == 1 and moved["atoms"] == 3 and 1 <= moved["longest_bond_over_start"] < 1.5
    if not missing:
        found = properties.relax(checkpoint, folder, "cpu")
        assert set(found) == {"same_start", "from_minimum"}
        for one in found.values():
            assert one["molecules"] == 1 and 0 < one["median_rmsd"] == one["largest_rmsd"]
        (times,) = properties.speed(checkpoint, "cpu", (1,), properties.STRICT).values()
        assert set(times) == {"potential", "gfn2"}
