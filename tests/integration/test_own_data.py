"""`e2former-fairchem train`: from files to a potential, and whatever is wrong with a user's files and options."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from e2former_fairchem import train
from e2former_fairchem.cli import main
from e2former_fairchem.compat import compose
from e2former_fairchem.own_data import run_file
from e2former_fairchem.own_data.checking import describe, find_problems
from e2former_fairchem.own_data.reading import Frame, Keys, read_frames
from e2former_fairchem.own_data.references import fit_references, residuals, shift_references
from e2former_fairchem.own_data.splitting import split
from e2former_fairchem.own_data.train import where_to_resume

TINY = [
    "backbone.sphere_channels=8",
    "backbone.num_layers=1",
    "backbone.num_heads=4",
    "backbone.num_radial_basis=8",
    "job.device_type=CPU",
]


def labelled(atoms: Atoms, seed: int, stress: bool = False) -> Atoms:
    """The structure rattled, with labels of ASE's toy potential for metals (which has parameters for H, C, N and O)."""
    atoms = atoms.copy()
    atoms.rattle(0.05, seed=seed)
    atoms.set_initial_magnetic_moments(None)
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if stress:
        labels["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


@pytest.fixture(scope="module")
def molecules() -> list[Atoms]:
    return [labelled(molecule("CH3OH" if n % 2 else "H2O"), n) for n in range(14)]


@pytest.fixture
def frames(molecules: list[Atoms], tmp_path: Path) -> list[Frame]:
    write(tmp_path / "own.xyz", molecules)
    return read_frames([tmp_path / "own.xyz"])


def problems(frames: list[Frame]) -> list[str]:
    find_problems(frames)
    return [re.sub(r"^\S*/", "", line) for line in describe(f for f in frames if f.problems)]


def test_reading_keeps_labels_cell_and_place(molecules: list[Atoms], tmp_path: Path) -> None:
    """Formats, compression, several files, databases; energies, forces and stress by any of the usual keys."""
    crystal = labelled(bulk("Cu", cubic=True), 1, stress=True)
    other = crystal.copy()
    other.info |= {"REF_energy": 1.5, "REF_stress": np.arange(9.0).reshape(3, 3), "total_charge": -1, "multiplicity": 2}
    other.arrays["REF_forces"] = np.ones((4, 3))
    write(tmp_path / "a.xyz.gz", molecules[:2], format="extxyz")
    write(tmp_path / "b.traj", [crystal])
    write(tmp_path / "c.xyz", [other])
    write(tmp_path / "d.db", molecules[2:4])
    found = read_frames([tmp_path / name for name in ("a.xyz.gz", "b.traj", "c.xyz", "d.db")])
    assert [(Path(f.file).name, f.number) for f in found] == [
        ("a.xyz.gz", 0),
        ("a.xyz.gz", 1),
        ("b.traj", 0),
        ("c.xyz", 0),
        ("d.db", 0),
        ("d.db", 1),
    ]
    for frame, atoms in zip([*found[:3], *found[4:]], [*molecules[:2], crystal, *molecules[2:4]], strict=True):
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        assert np.allclose(frame.forces, atoms.get_forces(), atol=1e-7)
        assert np.allclose(frame.atoms.cell, atoms.cell) and (frame.atoms.pbc == atoms.pbc).all()
    assert found[0].stress is None
    assert np.allclose(found[2].stress, crystal.get_stress(voigt=False))
    assert (found[3].energy, found[3].atoms.info) == (1.5, {"charge": -1, "spin": 2})
    assert np.allclose(found[3].stress, np.arange(9).reshape(3, 3))
    assert found[3].found["energy"] == "REF_energy"


def test_charge_and_spin_that_are_not_given(tmp_path: Path) -> None:
    """Neutral, with the lowest multiplicity that the electrons allow; a crystal's cell has no number of its own."""
    radical = Atoms("CH3", [[0, 0, 0], [1.08, 0, 0], [-0.54, 0.94, 0], [-0.54, -0.94, 0]])
    structures = [labelled(molecule("H2O"), 0), labelled(radical, 0), labelled(bulk("Al"), 0), labelled(radical, 1)]
    structures[3].info["charge"] = 1
    write(tmp_path / "own.xyz", structures)
    found = read_frames([tmp_path / "own.xyz"])
    assert [(f.atoms.info["charge"], f.atoms.info["spin"]) for f in found] == [(0, 1), (0, 2), (0, 1), (1, 1)]
    assert [f.assumed for f in found] == [
        {"charge": 0, "spin": 1},
        {"charge": 0, "spin": 2},
        {"charge": 0, "spin": 1},
        {"spin": 1},
    ]
    assert problems(found) == []
    write(tmp_path / "atoms.xyz", [Atoms(z, info={"REF_energy": -1.0}) for z in ("H", "C", "O", "He")])
    assert [f.atoms.info["spin"] for f in read_frames([tmp_path / "atoms.xyz"])] == [2, 3, 3, 1]
    structures[0].info["spin"] = 2
    structures[1].info["spin"] = 1.5
    write(tmp_path / "wrong.xyz", structures[:2])
    assert problems(read_frames([tmp_path / "wrong.xyz"])) == [
        "wrong.xyz: a multiplicity that the number of electrons does not allow: frame 0 (charge 0, multiplicity 2, 10 "
        "electrons)",
        "wrong.xyz: spin that is no integer: frame 1 (spin: expected an integer (to 0.001), got 1.5)",
    ]


def test_two_labels_that_differ_need_a_name(molecules: list[Atoms], tmp_path: Path) -> None:
    atoms = molecules[0].copy()
    atoms.calc = molecules[0].calc
    atoms.info["dft_energy"] = 7.0
    write(tmp_path / "own.xyz", atoms)
    with pytest.raises(ValueError, match=r"frame 0 has energy under .* --energy-key"):
        read_frames([tmp_path / "own.xyz"])
    assert read_frames([tmp_path / "own.xyz"], Keys(energy="dft_energy"))[0].energy == 7.0
    with pytest.raises(ValueError, match=r"--forces-key: .* got 'F'.*dft_energy"):
        read_frames([tmp_path / "own.xyz"], Keys(energy="dft_energy", forces="F"))


def test_bad_frames_are_named(molecules: list[Atoms], frames: list[Frame]) -> None:
    """Every kind, by file and number; of two equal structures the first is kept."""
    assert problems(frames) == []
    frames[1].energy = None
    frames[2].forces = frames[4].forces = None
    frames[3].forces = None
    frames[5].forces[0, 1] = np.nan
    frames[6].atoms.positions[1] = frames[6].atoms.positions[0] + 0.1
    frames[7].forces[0] = [40, 30, 10]
    frames[9].atoms = frames[11].atoms.copy()
    frames[10].atoms.positions[0] = np.inf
    lines = problems(frames)
    assert lines[:6] == [
        "own.xyz: no energy: frame 1",
        "own.xyz: no forces: frames 2-4",
        "own.xyz: forces not finite: frame 5",
        "own.xyz: atoms closer than 0.3 Å: frame 6",
        "own.xyz: forces above 50 eV/Å: frame 7 (50.99)",
        lines[5],
    ]
    assert lines[5].startswith("own.xyz: an unusable structure: frame 10 (positions: expected finite")
    assert lines[6:] == ["own.xyz: the same structure as an earlier frame: frame 11 (as 9)"]


def test_atoms_on_top_of_an_image_are_found() -> None:
    frame = Frame(
        Atoms("Cu2", [[0, 0, 0], [0, 0, 3.5]], cell=[3.6, 3.6, 3.6], pbc=True), "a", 0, {}, 0.0, np.zeros((2, 3))
    )
    frame.atoms.info.update(charge=0, spin=1)
    find_problems([frame])
    assert frame.problems == [("atoms closer than 0.3 Å", "")]


def test_split(frames: list[Frame]) -> None:
    """By number and seed, by group, and never an element's last training frame."""
    training, validation = split(frames, 0.2)
    assert len(validation) == 3 and len(training) == 11
    assert {f.number for f in training} | {f.number for f in validation} == set(range(14))
    assert [f.number for f in split(frames, 0.2)[1]] == [f.number for f in validation]
    assert [f.number for f in split(frames, 0.2, seed=1)[1]] != [f.number for f in validation]
    for seed in range(4):  # methanol has the only carbon
        _, validation = split(frames, 0.5, seed, by="composition")
        assert {f.atoms.get_chemical_formula() for f in validation} == {"H2O"}
    with pytest.raises(ValueError, match=r"--split-by: .*'batch'.*frame 0"):
        split(frames, 0.2, by="batch")
    with pytest.raises(ValueError, match=r"--valid-fraction: .* got none among 1 frames"):
        split(frames[:1], 0.5)
    with pytest.raises(ValueError, match=r"--valid-fraction: .* got 1"):
        split(frames, 1)


def test_references_of_atoms_by_fit_and_moved(frames: list[Frame], tmp_path: Path) -> None:
    exact = np.zeros(119)
    exact[[1, 6, 8]] = -13.0, -1030.0, -2040.0
    for frame in frames:
        frame.energy = exact[frame.atoms.numbers].sum() + 0.01 * frame.number
    table, undetermined = fit_references(frames)
    assert set(undetermined) == {"H", "C", "O"}  # two molecules, three elements
    assert np.abs(residuals(frames, table)).max() < 0.05
    atoms = [Atoms("H", info={"REF_energy": -12.0}), Atoms("O", info={"REF_energy": -2039.0})]
    write(tmp_path / "atoms.xyz", atoms)
    isolated = read_frames([tmp_path / "atoms.xyz"])
    assert (isolated[0].forces == 0).all() and problems(isolated) == []
    table, undetermined = fit_references([*isolated, *frames])
    assert (table[1], table[8], undetermined) == (-12.0, -2039.0, [])
    assert table[6] == pytest.approx(-1035, abs=0.2)  # what the others leave in methanol
    # A network that is right up to a change of the references starts without an error.
    other = np.zeros(119)
    other[[1, 6, 8]] = 5.0, 3.0, -2.0
    predicted = [frame.energy - other[frame.atoms.numbers].sum() for frame in frames]
    moved = shift_references(frames, predicted, exact)
    shift = moved - exact
    assert max(abs(shift[f.atoms.numbers].sum() + p - f.energy) for f, p in zip(frames, predicted, strict=True)) < 1e-6
    assert moved[7] == exact[7], "of an element that the frames do not have, the checkpoint's stays"
    # Electrons that some structures have lost move the reference of the charge, and no element.
    charged = [replace(f, atoms=f.atoms.copy(), energy=f.energy + 4.0) for f in frames]
    for frame in charged:
        frame.atoms.info["charge"] = 1
    both = shift_references([*frames, *charged], predicted * 2, exact)
    np.testing.assert_allclose(both, [4.0, *moved[1:]], atol=1e-6)


def test_the_run_follows_the_number_of_frames() -> None:
    """Batches, epochs, warm-up and averaging for a dozen frames, the size's claim, and many."""
    small = run_file.SIZES["small"]
    few, claim, many = (run_file.choose(small, n, 20 * n, False, {}) for n in (12, 450, 100_000))
    assert (few["batch_size"], claim["batch_size"], many["batch_size"]) == (1, 5, 5)
    assert (few["epochs"], many["epochs"]) == (160, 20)
    assert 1700 < claim["epochs"] * 90 < 2300
    for values in (few, claim, many):
        assert values["epochs"] % values["evaluate_every"] == 0
        assert values["checkpoint_every"] % values["metrics_every"] == 0
    tuned = run_file.choose(small, 450, 9000, True, {"epochs": 4, "batch_size": 30})
    assert (tuned["epochs"], tuned["batch_size"], tuned["warmup_steps"]) == (4, 30, 3)
    assert tuned["lr"] < claim["lr"]
    assert [run_file.ema_decay(steps) for steps in (1, 60, 1500, 10**6)] == [0.5, 0.75, 0.99, 0.999]
    with pytest.raises(ValueError, match=r"epochs: expected an integer of at least 1, got 0"):
        run_file.choose(small, 450, 9000, False, {"epochs": 0})


def test_keys_go_into_the_file() -> None:
    content = {"defaults": ["own_data", {"backbone": "e2former_v2_small"}, "_self_"], "lr": 1.0, "job": {"seed": 0}}
    given = run_file.parse(["backbone=e2former_v2_medium", "lr=1e-3", "job.device_type=CPU"])
    assert run_file.with_overrides(content, given) == {
        "defaults": ["own_data", {"backbone": "e2former_v2_medium"}, "_self_"],
        "lr": 1e-3,
        "job": {"seed": 0, "device_type": "CPU"},
    }
    for wrong in ("epochs", "+epochs=3", "=3"):
        with pytest.raises(ValueError, match=r"expected KEY=VALUE"):
            run_file.parse([wrong])


def test_where_a_training_is_resumed(tmp_path: Path) -> None:
    """From the newest whole checkpoint, or from the beginning; of the data in the folder."""
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"--resume: .* got .*run"):
        where_to_resume(folder, ["own.xyz"])
    checkpoints = folder / "2026" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (folder / "train.yaml").touch()
    (folder / "data.json").write_text(json.dumps({"files": [str(Path("own.xyz").absolute())]}))
    assert where_to_resume(folder, ["own.xyz"]) == folder / "train.yaml"
    for step in (10, 20, 30):
        (checkpoints / f"step_{step}").mkdir()
        if step < 30:  # the last one is not complete
            (checkpoints / f"step_{step}" / ".metadata").touch()
            os.utime(checkpoints / f"step_{step}" / ".metadata", (step, step))
    assert where_to_resume(folder, []) == checkpoints / "step_20" / "resume.yaml"
    with pytest.raises(
        ValueError, match=r"--resume: expected no files or those of the training, .*own.xyz.*, got .*more"
    ):
        where_to_resume(folder, ["more.xyz"])
    (checkpoints / "final").mkdir()
    (checkpoints / "final" / ".metadata").touch()
    with pytest.raises(ValueError, match=r"is finished: .*inference_ckpt.pt"):
        where_to_resume(folder, [])


def test_train_fine_tune_and_their_table(
    elsewhere: Path, capsys: pytest.CaptureFixture, launch: Callable, without_figures: None
) -> None:
    """One tiny training from a file with a bad frame, with stress, its table; then the fine-tuning of its result."""
    crystals = [labelled(bulk("Cu", cubic=True) if n % 2 else bulk("Al", cubic=True), n, True) for n in range(12)]
    crystals.insert(3, crystals[2])
    write("cells.traj", crystals)
    assert main(["train", "cells.traj", "--output", "run"]) == 2
    err = capsys.readouterr().err
    assert "1 of 13 frames cannot be used" in err and "frame 3 (as 2)" in err
    assert not Path("run").exists()
    assert main(["train", "cells.traj", "--output", "run", "--skip-bad", "epochs=2", "card.licence=MIT", *TINY]) == 0
    out = capsys.readouterr().out
    assert "no charge is given: charge 0 (12 frames)" in out
    table = json.loads(Path("run/table.json").read_text())
    assert (table["training"]["of"], table["validation"]["of"]) == (11, 1)
    printed = re.search(r"^validation +1 +(\S+) +(\S+) +\S+ % +(\S+)$", out, re.MULTILINE)
    assert float(printed[1]) == pytest.approx(1000 * table["validation"]["energy"], abs=0.06)
    assert float(printed[3]) == pytest.approx(1000 * table["validation"]["stress"], abs=6e-4)
    (path,) = re.findall(r"^report: (\S+)$", out, re.MULTILINE)
    reported = json.loads(Path(path).with_name("summary.json").read_text())["omol.val"]
    assert reported["stress_mae"] == pytest.approx(1000 * table["validation"]["stress"], rel=1e-3)
    assert "stress MAE" in Path(path).read_text()
    summary = json.loads(Path("run/data.json").read_text())
    assert summary["left_out"] == [f"{elsewhere}/cells.traj: the same structure as an earlier frame: frame 3 (as 2)"]

    # The checkpoint's card.
    capsys.readouterr()
    assert main(["info", "run/inference_ckpt.pt"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert (lines["elements"], lines["charges and multiplicities"]) == ("Al, Cu", "+0 and 1")
    assert (lines["data"], lines["structures"], lines["licence"]) == ("cells.traj", "11", "MIT")
    said = {kind: float(x) for kind, x in re.findall(r"(\w+) (\S+) meV", lines["errors on omol.val"])}
    assert said == pytest.approx({k: 1000 * table["validation"][k] for k in ("energy", "forces", "stress")}, rel=6e-3)
    assert re.search(r"e2former-fairchem \S+, fairchem-core 2\.\S+, torch \S+$", lines["made with"])

    # The same again is refused, and a finished training has nothing to resume.
    before = Path("run/inference_ckpt.pt").read_bytes()
    assert main(["train", "cells.traj", "--output", "run", "--skip-bad"]) == 2
    assert "is there already; --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", "run"]) == 2
    assert "is finished" in capsys.readouterr().err
    (final,) = Path("run").glob("*/checkpoints/final")
    final.rename(final.with_name("step_2"))
    assert main(["train", "--resume", "--output", "run", "epochs=9", "job.seed=0"]) == 2
    assert "--resume: expected no keys but those of job, runner, got epochs=9: " in capsys.readouterr().err
    final.with_name("step_2").rename(final)
    assert Path("run/inference_ckpt.pt").read_bytes() == before

    # The other level of theory: energies moved by elements. The network starts as good as it was, and at a learning
    # rate of zero stays so: the references that training writes into its checkpoint are the moved ones.
    for atoms in crystals[:3] + crystals[4:]:
        atoms.calc.results["energy"] += 100.0 * len(atoms)
    write("other.traj", crystals[:3] + crystals[4:])
    start = {"output": "tuned", "from_checkpoint": "run/inference_ckpt.pt"}
    rows = train("other.traj", **start, overrides=["epochs=1", "lr=0", TINY[-1]]).errors
    assert set(rows) == {"training, before", "training, after", "validation, before", "validation, after"}
    assert rows["training, before"].forces == pytest.approx(table["training"]["forces"], rel=1e-4)
    assert rows["training, before"].energy < table["training"]["energy"] + 1e-3
    assert rows["validation, before"].stress == pytest.approx(table["validation"]["stress"], rel=1e-4)
    for name in ("training", "validation"):
        before, after = rows[f"{name}, before"], rows[f"{name}, after"]
        assert dataclasses.astuple(after) == pytest.approx(dataclasses.astuple(before), rel=1e-4, abs=1e-5)
    model = hydra.utils.instantiate(compose("tuned/train.yaml").runner.train_eval_unit.model).state_dict()
    trained = torch.load("run/inference_ckpt.pt", weights_only=False).ema_state_dict
    heads = {"module." + name: tensor for name, tensor in model.items() if "elements_seen" not in name}
    assert heads and all(torch.equal(trained[name], tensor) for name, tensor in heads.items())

    crystals[7].calc.results["energy"] += 1000.0
    write("wrong.traj", crystals[4:])
    assert main(["train", "wrong.traj", "--output", "wrong", "--from", "run/inference_ckpt.pt"]) == 2
    assert "wrong.traj: frame 3: " in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_the_example_of_the_page(
    repo: Path, elsewhere: Path, capsys: pytest.CaptureFixture, launch: Callable, without_figures: None
) -> None:
    """docs/own_data.md as it stands, with fewer molecules and a tiny network; the table is what the trainer says."""
    page = (repo / "docs" / "own_data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    shorter = code.replace("range(60)", "range(10)").replace('["epochs=2"]', repr(["epochs=2", *TINY]))
    assert shorter.count("range(10)") == shorter.count("sphere_channels") == 1
    exec(compile(shorter, "own_data.md", "exec"), {})
    out = capsys.readouterr().out
    evaluated = re.findall(r"omol.val: E (\S+) meV/atom, F (\S+) eV", out)[-1]
    table = re.search(r"^validation +1 +(\S+) +(\S+) +\S+ %$", out, re.MULTILINE)
    assert [float(x) for x in evaluated] == pytest.approx([float(x) for x in table.groups()], abs=0.06)
    assert re.search(r"^-?\d+\.\d+ eV$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.xyz"], "no.xyz: no such file"),
        ([], "expected at least one file"),
        (["own.xyz", "own.xyz"], "expected each once"),
        (["text.xyz"], "expected a file that ASE reads"),
        (["own.xyz", "--from", "own.xyz"], "--from: expected an inference checkpoint"),
        (["own.xyz", "--from", "a.pt", "--size", "small"], "--size: expected none with --from"),
        (["own.xyz", "--valid", "lead.xyz"], "Pb occur in validation frames only"),
        (["own.xyz", "--valid", "own.xyz"], "--valid: expected a file that is not trained on"),
        (["own.xyz", "--resume"], "--resume: expected the folder of a training"),
        (["own.xyz", "epochs=many"], "epochs: expected an integer"),
        (["own.xyz", "epochs=1", "element_references=no/such.json"], "train: element_references: expected a JSON file"),
        (["own.xyz", "backbone=none_such", "epochs=1"], "none_such"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, molecules: list[Atoms], elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    write("own.xyz", molecules)
    write("lead.xyz", [Atoms("Pb", info={"REF_energy": 1.0})])
    Path("text.xyz").write_text("nothing\nof the kind\n")
    files = {p.name for p in elsewhere.iterdir()}
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("e2former-fairchem train: ") and message in err
    assert "Traceback" not in err
    assert {p.name for p in elsewhere.rglob("*") if p.is_file()} == files


def test_the_table_of_sizes(repo: Path) -> None:
    """Shapes and parameters that docs/own_data.md has of each size are the networks'."""
    page = (repo / "docs" / "own_data.md").read_text()
    for name, size in run_file.SIZES.items():
        overrides = [f"backbone={size.backbone}", "heads=e2former_v2_conserving", "job.device_type=CPU"]
        config = compose(repo / "configs" / "quickstart.yaml", overrides).runner.train_eval_unit.model
        parameters = sum(parameter.numel() for parameter in hydra.utils.instantiate(config).parameters())
        backbone = config.backbone
        shape = f"{backbone.num_layers} layers of {backbone.sphere_channels} channels, {backbone.cutoff:g} Å"
        assert re.search(rf"^\| `{name}` \| {shape}[^|]*\| {parameters:,} \|", page, re.MULTILINE), (shape, parameters)


def test_help_and_version_do_not_import_fairchem(repo: Path) -> None:
    """What makes them fast: neither torch nor fairchem is loaded."""
    code = (
        "import sys, e2former_fairchem_cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit as e: print('status', e)"
    )
    code += "\nprint(sorted({'torch', 'fairchem', 'e2former_fairchem', 'hydra'} & set(sys.modules)))"
    for options, text in (
        (["--help"], "train on your own structures"),
        (["--version"], "e2former-fairchem 0."),
        (["train", "--help"], "--valid-fraction"),
    ):
        command = [sys.executable, "-c", code, *options]
        out = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=60, check=True).stdout
        assert text in out and out.splitlines()[-2:] == ["status 0", "[]"]
