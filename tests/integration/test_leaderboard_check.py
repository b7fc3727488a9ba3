"""`e2former-fairchem check-submission`: every defect is found, named, and changes the exit status."""

from __future__ import annotations

import copy
import gzip
import importlib.metadata
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.db import connect
from pymatgen.io.ase import MSONAtoms

from e2former_fairchem.cli import COMMANDS, main
from e2former_fairchem.data.make_sample import write_folder
from e2former_fairchem.leaderboard.check_task import atoms_of
from e2former_fairchem.leaderboard.relax import point

NATOMS = [3, 1, 4]


def s2ef_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "ids": np.array([f"omol/{i}" for i in range(3)]),
        "energy": rng.normal(size=3),
        "forces": rng.normal(size=(sum(NATOMS), 3)),
        "natoms": np.array(NATOMS, np.int64),
    }


def change(name: str, value: Any) -> Callable[[dict], None]:
    return lambda arrays: arrays.__setitem__(name, value(arrays[name]))


def with_nan(array: np.ndarray, *where: int) -> np.ndarray:
    array = array.copy()
    array[where] = np.nan
    return array


DEFECTS = {
    "duplicate id": (change("ids", lambda a: a[[0, 1, 1]]), r"each id once, got repeated 1 \(omol/1\)"),
    "pickled ids": (change("ids", lambda a: a.astype(object)), "got none called ids"),
    "bytes": (change("ids", lambda a: a.astype("S")), r"ids: expected str \(N,\)"),
    "empty id": (change("ids", lambda a: np.array(["", *a[1:]])), "expected names, got 1 empty"),
    "float32": (change("energy", lambda a: a.astype("f4")), r"energy: expected float64 \(N,\) with N = 3, got float32"),
    "column": (change("energy", lambda a: a[:, None]), r"energy: expected .*, got float64 \(3, 1\)"),
    "int32": (change("natoms", lambda a: a.astype("i4")), "natoms: expected int64"),
    "flat forces": (change("forces", lambda a: a.ravel()), r"forces: expected float64 \(sum natoms, 3\)"),
    "lost row": (change("forces", lambda a: a[1:]), r"forces: expected 8 rows \(the sum of natoms\), got 7"),
    "nan energy": (change("energy", lambda a: with_nan(a, 2)), r"energy: expected finite .* for 1 \(omol/2\)"),
    "nan force": (change("forces", lambda a: with_nan(a, 3, 1)), r"others in 1 rows, of 1 \(omol/1\)"),
    "no atoms": (change("natoms", lambda a: np.array([-1, 5, 4])), r"natoms: expected at least 1, .* 1 \(omol/0\)"),
    "no forces": (lambda arrays: arrays.pop("forces"), "got none called forces"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_s2ef_defects(defect: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arrays = s2ef_arrays()
    spoil, message = DEFECTS[defect]
    spoil(arrays)
    np.savez_compressed(tmp_path / "file.npz", **arrays)
    assert main(["check-submission", str(tmp_path / "file.npz"), "--task", "s2ef"]) == 1
    found = capsys.readouterr().out
    (line,) = [line for line in found.splitlines() if "PROBLEM" in line]
    assert re.search(message, line), line
    assert "do not upload" in found


def test_s2ef_against_references(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Against a data set and against another file: the same ids and numbers of atoms."""
    frames = []
    for k, n in enumerate(NATOMS):
        atoms = Atoms("H" * n, positions=np.arange(3 * n).reshape(n, 3))
        atoms.info = {"charge": 0, "spin": 1, "source": f"omol/{k}", "data_id": "rgd"}
        frames.append(atoms)
    write_folder(frames, tmp_path / "data")
    arrays = s2ef_arrays()
    np.savez(tmp_path / "good.npz", **arrays)
    call = ["check-submission", str(tmp_path / "good.npz"), "--task", "s2ef", "--reference"]
    assert main([*call, str(tmp_path / "data")]) == 0
    assert "ready for the upload" in capsys.readouterr().out

    other = dict(arrays, ids=np.array(["omol/0", "omol/1", "omol/9"]), natoms=np.array([3, 2, 3]))
    np.savez(tmp_path / "other.npz", **other)
    assert main([*call, str(tmp_path / "other.npz")]) == 1
    out = capsys.readouterr().out
    assert "got none of 1 (omol/9)" in out
    assert "got unknown 1 (omol/2)" in out
    assert "omol/1: expected 2, got 1" in out


def test_completeness_needs_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A file alone is well formed at best, a foreign reference has no id of it, and a part is missing something."""
    np.savez(tmp_path / "part.npz", **s2ef_arrays())
    call = ["check-submission", str(tmp_path / "part.npz"), "--task", "s2ef"]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "well formed, completeness not checked"
    assert "ready" not in out
    assert "2762021 (validation) or 2805046 (test) structures, this file has 3" in out

    ids = np.array([f"spice/{i}" for i in range(5)])
    np.savez(tmp_path / "foreign.npz", ids=ids, natoms=np.array([3, 1, 4, 1, 1], np.int64))
    assert main([*call, "--reference", str(tmp_path / "foreign.npz")]) == 1
    out = capsys.readouterr().out
    assert "ids: expected the 5 of the reference, like spice/0, got 3 others, like omol/0" in out
    assert "as in the reference" not in out and "ok       all" not in out

    more = dict(s2ef_arrays(), ids=np.array(["omol/0", "omol/1", "omol/2", "omol/3"]), natoms=np.array([3, 1, 4, 2]))
    np.savez(tmp_path / "more.npz", **more)
    assert main([*call, "--reference", str(tmp_path / "more.npz")]) == 1
    assert "ids: expected 4 of the reference, got none of 1 (omol/3)" in capsys.readouterr().out

    path = write(tmp_path / "file.json.gz", GOOD["spingap"])
    other = write(tmp_path / "other.json.gz", {"y": GOOD["spingap"]["x"]})
    call = ["check-submission", str(path), "--task", "spingap"]
    assert main(call) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "well formed, completeness not checked"
    assert main([*call, "--reference", str(other)]) == 1
    out = capsys.readouterr().out
    assert "calculations: expected the 2 of the reference, like y/1, got 2 others, like x/1" in out
    assert "as in the reference" not in out


def test_reference_without_ids(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    with connect(str(tmp_path / "data" / "data.aselmdb"), use_lock_file=False) as rows:
        rows.write(Atoms("H"))
    np.savez(tmp_path / "file.npz", **s2ef_arrays())
    call = ["check-submission", str(tmp_path / "file.npz"), "--task", "s2ef"]
    assert main([*call, "--reference", str(tmp_path / "data")]) == 2
    assert "--reference: expected atoms.info['source']" in capsys.readouterr().err


def test_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check-submission", str(tmp_path / "none.npz"), "--task", "s2ef"]) == 2
    assert "which does not exist" in capsys.readouterr().err
    np.savez(tmp_path / "cut.npz", **s2ef_arrays())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-200])
    assert main(["check-submission", str(tmp_path / "cut.npz"), "--task", "s2ef"]) == 1
    assert "expected a whole .npz file" in capsys.readouterr().out
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"a": {}}' * 50)[:-20])
    assert main(["check-submission", str(tmp_path / "cut.json.gz"), "--task", "ieea"]) == 1
    assert "expected JSON or gzipped JSON, got EOFError" in capsys.readouterr().out


def single(atoms: Atoms, energy: float = -1.0) -> dict[str, Any]:
    return point(atoms, energy, np.zeros((len(atoms), 3)))


WATER = Atoms("OH2", positions=[[0, 0, 0.1], [0, 0.8, -0.5], [0, -0.8, -0.5]], info={"charge": 0, "spin": 1})
HELIUM = Atoms("He", positions=[[0.1, 0.2, 4]], info={"charge": 0, "spin": 1})
RELAXED = {"initial": single(WATER), "final": single(WATER)}
GOOD: dict[str, dict[str, Any]] = {
    "ligand_pocket": {
        "x": {"ligand": single(HELIUM), "pocket": single(WATER), "ligand_pocket": single(HELIUM + WATER)}
    },
    "ligand_strain": {"x": {"bioactive": single(WATER), "gas_phase": {"0": RELAXED, "1": RELAXED}}},
    "conformers": {"family": {"c0": RELAXED, "c1": RELAXED}},
    "protonation": {"family": {"name_0_1": RELAXED, "name_-1_1": RELAXED}},
    "ieea": {"7": {"-1": {"2": single(WATER)}, "0": {"1": single(WATER)}, "1": {"2": single(WATER)}}},
    "spingap": {"x": {"1": single(WATER), "3": single(WATER)}},
    "distance_scaling": {"v": {"x": {"short_range_1": single(WATER), "long_range_2": single(WATER)}}},
}


def write(path: Path, content: Any) -> Path:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def at(tree: dict, *keys: str) -> dict:
    for key in keys:
        tree = tree[key]
    return tree


def shifted(tree: dict, *keys: str) -> None:
    atoms = WATER.copy()
    atoms.positions += 1e-3
    at(tree, *keys)["atoms"] = single(atoms)["atoms"]


TASK_DEFECTS = {
    "nan": ("spingap", lambda t: at(t, "x", "1").update(energy=float("nan")), "x/1: energy: expected a finite number"),
    "text": (
        "spingap",
        lambda t: at(t, "x", "1").update(energy="-1"),
        "x/1: energy: expected a finite number, got '-1'",
    ),
    "forces": (
        "spingap",
        lambda t: at(t, "x", "3").update(forces=[[0, 0, 0]]),
        "x/3: forces: expected (3, 3), got (1",
    ),
    "no forces": ("spingap", lambda t: at(t, "x", "3").pop("forces"), "got none of forces"),
    "no atoms": ("spingap", lambda t: at(t, "x", "3").update(atoms={}), "x/3: atoms: expected an MSONAtoms object"),
    "depth": ("ieea", lambda t: t.update({"7": at(t, "7", "0")}), "expected results of ieea at depth 3"),
    "charges": ("ieea", lambda t: at(t, "7").pop("0"), "7: charges -1, 1"),
    "spins": ("spingap", lambda t: at(t, "x").pop("3"), "x: spins 1"),
    "names": ("protonation", lambda t: at(t, "family").update(acid=RELAXED), "family/acid"),
    "points": ("distance_scaling", lambda t: at(t, "v", "x").update(far=single(WATER)), "v/x/far"),
    "no bioactive": ("ligand_strain", lambda t: at(t, "x").pop("bioactive"), "bioactive and at least one gas_phase"),
    "no final": ("conformers", lambda t: at(t, "family", "c0").pop("final"), "family/c0: expected a relaxation"),
    "other elements": (
        "conformers",
        lambda t: at(t, "family", "c0").update(final=single(HELIUM)),
        "final: expected the elements of initial",
    ),
    "component moved": ("ligand_pocket", lambda t: shifted(t, "x", "pocket"), "not exactly those of ligand_pocket"),
    "position not finite": (
        "spingap",
        lambda t: at(t, "x", "1").update(atoms=MSONAtoms(Atoms("OH2", [[np.nan] * 3] * 3)).as_dict()),
        "x/1: atoms: expected finite positions",
    ),
    "missing component": ("ligand_pocket", lambda t: at(t, "x").pop("ligand"), "x: has pocket, ligand_pocket"),
    "empty": ("spingap", lambda t: t["x"].clear(), "x: expected an object with results, got an empty object"),
}


@pytest.mark.parametrize("task", GOOD)
def test_good_tasks(task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "results.json.gz", GOOD[task])
    assert main(["check-submission", str(path), "--task", task, "--reference", str(path)]) == 0
    assert "PROBLEM" not in capsys.readouterr().out


@pytest.mark.parametrize("defect", TASK_DEFECTS)
def test_task_defects(defect: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task, spoil, message = TASK_DEFECTS[defect]
    content = copy.deepcopy(GOOD[task])
    spoil(content)
    assert main(["check-submission", str(write(tmp_path / "file.json.gz", content)), "--task", task]) == 1
    out = capsys.readouterr().out
    assert message in out, out


def test_task_against_its_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Another start, a missing and an unknown system."""
    inputs = {"x": {1: {"atoms": WATER}, 3: {"atoms": WATER}}, "y": {1: {"atoms": WATER}, 3: {"atoms": WATER}}}
    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps(inputs))
    content = copy.deepcopy(GOOD["spingap"]) | {"z": GOOD["spingap"]["x"]}
    shifted(content, "x", "1")
    path = write(tmp_path / "file.json.gz", content)
    call = ["check-submission", str(path), "--task", "spingap", "--reference", str(tmp_path / "inputs.pkl")]
    assert main(call) == 1
    out = capsys.readouterr().out
    assert "got none of 2 (y/1, y/3)" in out
    assert "got unknown 2 (z/1, z/3)" in out
    assert "x/1: positions up to 0.001 Å off" in out


def replaced(content: Any, positions: Callable[[np.ndarray], np.ndarray]) -> Any:
    """The same results with other positions."""
    if not isinstance(content, dict):
        return content
    if "atoms" in content:
        atoms = atoms_of(content)
        atoms.positions = positions(atoms.positions)
        return {**content, "atoms": MSONAtoms(atoms).as_dict()}
    return {key: replaced(value, positions) for key, value in content.items()}


@pytest.mark.parametrize("task", ["ligand_pocket", "conformers", "spingap"])
def test_rounded_positions_match(task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Three decimals or four are the same structure; an atom moved by more than rounding moves it is not."""
    content = replaced(GOOD[task], lambda pos: pos * np.pi / 3 + np.e)
    reference = write(tmp_path / "reference.json.gz", content)
    call = ["check-submission", str(tmp_path / "file.json.gz"), "--task", task, "--reference", str(reference)]
    for decimals in (3, 4):
        write(tmp_path / "file.json.gz", replaced(content, lambda pos: pos.round(decimals)))  # noqa: B023
        assert main(call) == 0, capsys.readouterr().out
        assert "starting positions (within 0.00055 Å) as in the reference" in capsys.readouterr().out
    path = {"ligand_pocket": "x/pocket", "conformers": "family/c0", "spingap": "x/1"}[task]
    moved = replaced(content, lambda pos: pos.round(4))
    result = at(moved, *path.split("/"))
    result = result.get("initial", result)
    result |= replaced({"atoms": result["atoms"]}, lambda pos: pos + np.eye(len(pos), 3) * 7e-4)
    write(tmp_path / "file.json.gz", moved)
    assert main(call) == 1
    assert re.search(rf"got others in 1 \({path}: positions up to 0.000(7|6\d|7\d) Å off\)", capsys.readouterr().out)


def test_repeated_json_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inner = json.dumps(GOOD["spingap"]["x"])
    (tmp_path / "file.json").write_text(f'{{"x": {inner}, "x": {inner}}}')
    assert main(["check-submission", str(tmp_path / "file.json"), "--task", "spingap"]) == 1
    assert "expected each key once, got 'x' repeated" in capsys.readouterr().out


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    """The console script is installed, and its help lists every subcommand."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="e2former-fairchem")
    assert script.load() is main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
