"""Every example runs as it stands: here on a small random model, with few steps."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2former_fairchem.training.card import write_card
from e2former_fairchem.training.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = r"[-+]?\d+\.?\d*(?:e[-+]\d+)?"

# Example: arguments, lines its output must have, modules it needs.
RUNS = {
    "relaxation": (["--steps", "3"], [r"LBFGS .*in 3 steps: gained \d", r"FIRE .*in 3 steps: gained \d"], ()),
    "molecular_dynamics": (
        ["--steps", "4"],
        [rf"NVE 0\.002 ps: drift {NUMBER} meV/atom/ps, fluctuation", r"NVT 200 K: mean temperature \d+ K over 4 steps"],
        (),
    ),
    "vibrations": (["--steps", "2"], [r"analytic Hessian", r"Hessians \d\.\de-0[4-9], asymmetry"], ()),
    "cell_relaxation": (
        ["--steps", "2"],
        [rf"stress xx ({NUMBER}) eV/Å\^3.*differences ({NUMBER})", r"after 2 steps"],
        (),
    ),
    "charge_and_spin": (
        [],
        [
            r"CH3OH less H3 +charge -1 spin 1: +-?\d",
            r"acetic acid: [-+]\d.* \(\+1\.523\)",
            r"ionisation energy: [-+]\d",
            r"above C-H: [-+]\d",
        ],
        (),
    ),
    "ensemble": (
        ["--steps", "2"],
        [rf"O-H 0\.90 Å: {NUMBER} ± 0\.000 eV, forces ± 0\.000 eV/Å", r"O-H 1\.90 Å"],  # one checkpoint, twice
        (),
    ),
    "embeddings": (
        [],
        [
            r"9 atoms, 16 channels, 9 rows of degrees 0 to 2",
            r"H3, 0\.97 Å from O: \+1\.000",
            r"H8, .*: [-+][01]\.\d{3}",
        ],
        (),
    ),
    "batched": (
        ["--number", "3", "--steps", "2"],
        [r"3 structures: \d+ ms in one batch", r"difference of an energy: 0\.00", r"relaxed 3 structures concurrently"],
        ("ray",),
    ),
    "graph_parallel": (
        ["--atoms", "12"],
        [
            r"12 atoms on 2 workers: \d+ ms a step",
            r"difference from one worker: 0\.00\d+ meV/atom, \d\.\de-0[5-9] eV/Å",
        ],
        ("ray",),
    ),
    "phonons_and_elasticity": (
        ["--supercell", "1"],
        [rf"phonons: highest frequency {NUMBER} K", rf"moduli: bulk {NUMBER} GPa"],
        ("phonopy", "pymatgen"),
    ),
    "lammps_nve": (
        ["--steps", "3"],
        [r"LAMMPS, 3 steps: potential -?\d", r"largest force \d"],
        ("fairchem.lammps", "lammps"),
    ),
    "openmm_nvt": (
        ["--steps", "3"],
        [rf"OpenMM, 3 steps: potential {NUMBER} kJ/mol, kinetic {NUMBER} kJ/mol"],
        ("openmmml",),
    ),
    "torch_sim_relaxation": (["--steps", "2"], [rf"CH4O +{NUMBER} eV -> +{NUMBER} eV"], ("torch_sim",)),
}
RAY = [name for name, (_, _, modules) in RUNS.items() if "ray" in modules]


def missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small.pt", cutoff=4.0)


@pytest.fixture
def run(run_script: Callable[..., None], elsewhere: Path, capfd) -> Iterator[Callable[..., str]]:
    """An example in this process (a new one takes ten seconds of imports); returns what it printed."""

    def call(name: str, *arguments: str) -> str:
        run_script(ROOT / "examples" / f"{name}.py", *arguments)
        return capfd.readouterr().out

    yield call
    logging.disable(logging.NOTSET)


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES} == {*RUNS, "common", "crystals", "dispersion", "fine_tuning"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in RAY else n for n in RUNS])
def test_example(name, run, checkpoint) -> None:
    arguments, expected, modules = RUNS[name]
    absent = [module for module in modules if missing(module)]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed")
    if name in RAY:  # Ray changes the logging of its process
        out = process(name, str(checkpoint), *arguments)
    else:
        out = run(name, *[str(checkpoint)] * (1 + (name == "ensemble")), *arguments)
    for pattern in expected:
        assert re.search(pattern, out), f"{pattern!r} not in {out}"
    if name == "cell_relaxation":
        stress, numeric = map(float, re.search(expected[0], out).groups())
        assert stress == pytest.approx(numeric, abs=2e-6)


def process(name: str, *arguments: str) -> str:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_no_checkpoint(run, capfd) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("relaxation", "absent.pt")
    assert re.search(r"checkpoint's file or one of gfn2-small, got \S*absent\.pt", capfd.readouterr().err)


def test_a_missing_package_is_one_line(run, monkeypatch) -> None:
    for name, module in (("openmm_nvt", "openmm"), ("torch_sim_relaxation", "torch_sim"), ("lammps_nve", "lammps")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match=rf"^{name}.py: .*{module}"):
            run(name)


def test_dispersion(run, tmp_path, write_checkpoint, d3_table, monkeypatch) -> None:
    """With the coefficients where fairchem keeps them; refused without PBE on the card."""
    path = write_checkpoint(tmp_path / "small.pt", num_layers=1, sphere_channels=8)
    for arguments in ([], [str(path)]):  # of gfn2-small's card, and of none
        with pytest.raises(SystemExit, match=r"^dispersion.py: .*: expected the level of theory PBE, .*got \S+$"):
            run("dispersion", *arguments)
    write_card(path, {"level_of_theory": "PBE"})
    table = tmp_path / ".cache" / "nvalchemiops" / "dftd3_parameters.pt"
    table.parent.mkdir(parents=True)
    table.symlink_to(d3_table)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = run("dispersion", str(path), "--steps", "2")
    near, far = (
        float(e) for e in re.findall(rf"^\d\.\d Å: {NUMBER} eV, of which dispersion ({NUMBER}) eV$", out, re.M)
    )
    assert near < far < 0


def test_crystals(launch, run, without_figures) -> None:
    out = run("crystals", "--structures", "10", "--epochs", "1")
    stress = re.search(rf"^stress of cells held out: ({NUMBER}) meV/Å\^3$", out, re.MULTILINE)
    table = re.search(rf"^validation .* ({NUMBER})$", out, re.MULTILINE)  # its last column is the stress
    assert float(stress[1]) == pytest.approx(float(table[1]), rel=0.01)
    assert re.search(rf"^copper, lattice constant: {NUMBER} Å \(EMT: 3\.590\)$", out, re.MULTILINE)


def test_fine_tuning(launch, run, tmp_path, write_checkpoint, without_figures) -> None:
    """A second run has a folder of its own; the result is another potential than the one it started from."""
    first = Path("runs/fine_tuning")
    first.mkdir(parents=True)
    small = write_checkpoint(tmp_path / "small.pt", num_layers=1, sphere_channels=8)
    out = run("fine_tuning", str(small), "--structures", "10", "--epochs", "1")
    assert re.search(rf"^forces of structures held out: {NUMBER} -> {NUMBER} eV/Å$", out, re.MULTILINE)
    assert not list(first.iterdir())
    before, after = (read_checkpoint(path).ema_state_dict for path in (small, "runs/fine_tuning_2/inference_ckpt.pt"))
    apart = [float((value - after[key]).abs().max()) for key, value in before.items() if "weight" in key]
    assert 0 < max(apart) < 0.1, "a few steps away from where it started"
