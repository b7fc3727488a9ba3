"""`fairchem -c configs/md.yaml`: integrators, files, restarts, and what goes wrong."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.io import read, write
from fairchem.core._cli import get_hydra_config_from_yaml

from e2former_fairchem.leaderboard import predictor as prediction
from e2former_fairchem.md.ase_engine import ASEEngine
from e2former_fairchem.md.engine import BlownUp, Observables, draw_velocities
from e2former_fairchem.md.record import claim, read_log
from e2former_fairchem.md.settings import Settings
from e2former_fairchem.pes.systems import load_systems
from e2former_fairchem.runners.md import MDRunner

sys.path.insert(0, str(Path(__file__).parent))
import md_process
from md_process import simulate


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    """Its forces are small: a molecule stays together for some steps."""
    return write_checkpoint(tmp_path_factory.mktemp("md") / "small.pt", cutoff=4.0, num_layers=1)


@pytest.fixture(scope="module")
def structures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("structures")
    water = molecule("H2O")
    water.info.update(charge=0, spin=1)
    ((_, crystal),) = load_systems(["ammonia_crystal"], "x")
    crystal.info.update(charge=0, spin=1)
    found = {"water": water, "crystal": crystal}
    for name, atoms in found.items():
        write(folder / f"{name}.xyz", atoms)
    return {name: str(folder / f"{name}.xyz") for name in found}


@pytest.fixture
def config(repo: Path) -> Path:
    return repo / "configs" / "md.yaml"


@pytest.fixture(params=["ase", "nvalchemi"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that is installed."""
    if request.param == "nvalchemi" and importlib.util.find_spec("nvalchemi") is None:
        pytest.skip('nvalchemi-toolkit is not installed: pip install "e2former-fairchem[md]"')
    return request.param


def files(folder: Path) -> dict[str, Any]:
    """What a run wrote, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "md.jsonl").read_text().splitlines()]
    for line in lines:
        del line["ns_per_day"]
    return {"log": lines, "trajectory": (folder / "trajectory.extxyz").read_text()}


def run_alone(process: BaseProcess) -> int:
    """The exit status of a process."""
    process.start()
    process.join(300)
    process.kill()  # one that is there still would be waited for at the end
    process.join()
    return process.exitcode


def test_a_whole_run(
    launch: Callable, config: Path, checkpoint: Path, structures: dict, elsewhere: Path, capfd
) -> None:
    overrides = (f"checkpoint={checkpoint}", f"structure={structures['water']}", "job.device_type=CPU", "steps=25")
    launch(config, *overrides, "log_every=5", "save_every=10", "inference=batch")
    folder = elsewhere / "runs" / "md"
    log = read_log(folder)
    assert log["step"].tolist() == [0, 5, 10, 15, 20, 25] and log["time"][-1] == 0.0125
    assert np.isfinite(log["ns_per_day"][1:]).all() and np.isnan(log["pressure"]).all()
    frames = read(folder / "trajectory.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == [0, 10, 20, 25]
    assert frames[-1].get_potential_energy() == pytest.approx(log["potential_energy"][-1])
    assert frames[-1].get_kinetic_energy() == pytest.approx(log["kinetic_energy"][-1], rel=1e-5)
    assert frames[-1].info["charge"] == 0 and frames[-1].info["spin"] == 1
    assert (folder / "md.png").stat().st_size > 10_000
    report = json.loads((folder / "md.json").read_text())
    assert report["results"]["steps"] == 25 and report["settings"]["ensemble"] == "nve"
    spread = np.ptp(log["total_energy"])
    assert spread < 0.05 * np.ptp(log["kinetic_energy"]), "velocity Verlet conserves the energy"
    out = capfd.readouterr().out
    assert "step 25/25, 0.0125 ps: " in out and "ns/day" in out and "drift of the total energy" in out

    launch(config, *overrides, "log_every=5", "save_every=10", "inference=batch", "steps=30")
    assert read_log(folder)["step"].tolist() == [0, 5, 10, 15, 20, 25, 30], "the same command with more steps goes on"


@pytest.mark.parametrize(("ensemble", "structure"), [("nve", "water"), ("nvt", "water"), ("npt", "crystal")])
def test_killed_run_goes_on(
    engine: str, ensemble: str, structure: str, checkpoint: Path, structures: dict, tmp_path: Path, forks: BaseContext
) -> None:
    """SIGKILL at some step: the files are in the end those of a run that nobody killed."""
    options = {"engine": engine, "ensemble": ensemble, "barostat_time": 100.0}
    simulate(checkpoint, tmp_path / "whole", structures[structure], **options)
    arguments = (checkpoint, tmp_path / "killed", structures[structure])
    given = options | {"threads": torch.get_num_threads(), "line": 9}
    assert run_alone(forks.Process(target=md_process.killed, args=arguments, kwargs=given)) == -signal.SIGKILL
    assert len((tmp_path / "killed" / "md.jsonl").read_text().splitlines()) == 9
    simulate(*arguments, **options)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_signal_stops_after_a_step(
    launch: Callable, forks: BaseContext, config: Path, checkpoint: Path, structures: dict, elsewhere: Path, capfd
) -> None:
    overrides = (f"checkpoint={checkpoint}", f"structure={structures['water']}", "job.device_type=CPU", "steps=24")
    overrides = (*overrides, "log_every=1", "inference=batch", "plot=false")
    folder = elsewhere / "runs" / "md"
    given = {"line": 9, "output": elsewhere / "output.txt"}
    process = forks.Process(target=md_process.terminated, args=(config, *overrides), kwargs=given)
    assert run_alone(process) == 128 + signal.SIGTERM
    assert read_log(folder)["step"].tolist() == list(range(9)), "the step is finished, and no other one begun"
    launch(config, *overrides)
    assert read_log(folder)["step"].tolist() == list(range(25))
    assert "SIGTERM: stopped; the same command goes on from here" in given["output"].read_text()
    assert "goes on at step 8 of the run in" in capfd.readouterr().out, "not at step 0, although restart_every is 1000"


def test_a_structure_that_blows_up(engine: str, checkpoint: Path, structures: dict, tmp_path: Path) -> None:
    with pytest.raises(BlownUp, match=r"step (\d+) \(.* ps\): atom [12] \(H\) moved [\d.e+]+ Å in one step .* force "):
        simulate(checkpoint, tmp_path, structures["water"], timestep=30.0, engine=engine)
    log = read_log(tmp_path)
    assert log["step"].tolist() == list(range(len(log["step"]))), "all until then is there"


class Fails(Calculator):
    """No forces; at some evaluation an error, or a force that is not a number."""

    implemented_properties = ("energy", "forces")

    def __init__(self, at: int = 10**9, error: Exception | None = None) -> None:
        super().__init__()
        self.left, self.error = at, error

    def calculate(self, *args: Any) -> None:
        super().calculate(*args)
        self.left -= 1
        self.results = {"energy": 0.0, "forces": np.zeros((len(self.atoms), 3))}
        if self.left == 0 and self.error is not None:
            raise self.error
        if self.left == 0:
            self.results["forces"][1] = np.nan


def pair() -> Atoms:
    atoms = Atoms("HO", [[0, 0, 0], [5, 0, 0]])
    draw_velocities(atoms, 300.0, 1)
    return atoms


def test_the_step_of_an_error() -> None:
    with pytest.raises(BlownUp, match=r"step 3 \(0.0015 ps\): atom 1 \(O\) moved .* force nan eV/Å; 1 atoms alike"):
        ASEEngine(pair(), Fails(4), Settings()).advance(9)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        ASEEngine(pair(), Fails(4, RuntimeError("out of memory")), Settings()).advance(9)
    assert caught.value.__notes__ == ["in step 3 (0.0015 ps)"]


def test_temperature_of_two_atoms() -> None:
    """Without forces: what the thermostat and the degrees of freedom are worth, where they matter most."""
    engine = ASEEngine(pair(), Fails(), Settings("nvt", temperature=400.0, timestep=2.0, thermostat_time=10.0))
    found = []
    for _ in range(2000):
        engine.advance(1)
        found.append(Observables.of(engine.frame()).temperature)
    assert np.mean(found) == pytest.approx(400.0, rel=0.15)
    assert np.abs(engine.frame().get_momenta().sum(0)).max() < 1e-12


def test_errors_come_before_the_model(structures: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"epoch": 1}, tmp_path / "foreign.pt")  # which no model can be loaded from
    fixed = molecule("H2O")
    fixed.set_constraint(FixAtoms([0]))
    write(tmp_path / "fixed.xyz", fixed)
    write(tmp_path / "two.xyz", [molecule("H2O"), molecule("N2")])
    common = {"structure": structures["water"], "output_dir": str(tmp_path / "out")}
    common["checkpoint"] = str(tmp_path / "foreign.pt")
    for changed, error, message in (
        ({"structure": None}, ValueError, "structure: expected a file that ASE reads, got nothing; add structure=FILE"),
        ({"structure": "absent.xyz"}, FileNotFoundError, "structure: expected .* a file that ASE reads, got 'absent"),
        ({"structure": str(tmp_path / "two.xyz")}, ValueError, "structure: expected one structure, got 2 .*@0"),
        ({"structure": str(tmp_path / "fixed.xyz")}, ValueError, "structure: expected no constraints, .* FixAtoms"),
        ({"checkpoint": None}, ValueError, "checkpoint: expected an inference checkpoint .*, got nothing"),
        ({"ensemble": "nvm"}, ValueError, "ensemble: expected one of nve, nvt, npt, got 'nvm'"),
        ({"ensemble": "npt"}, ValueError, "ensemble: expected nve or nvt for a structure with pbc .*False.*, got npt"),
        ({"ensemble": "nvt", "temperature": 0}, ValueError, "temperature: expected a number above 0, got 0"),
        ({"engine": "lammps"}, ValueError, "engine: expected one of .*, got 'lammps'"),
        ({"timestep": 0}, ValueError, "timestep: expected a number above 0, got 0"),
        ({"steps": 0.5}, ValueError, "steps: expected an integer of at least 1, got 0.5"),
        ({"inference": "slow"}, ValueError, "inference: expected a preset's name"),
        ({"log_every": 0}, ValueError, "log_every: expected an integer of at least 1, got 0"),
        ({"plot": "yes"}, ValueError, "plot: expected true or false, got 'yes'"),
    ):
        with pytest.raises(error, match=message):
            MDRunner(**common | changed)
    monkeypatch.setitem(sys.modules, "nvalchemi", None)  # as where it is not installed
    with pytest.raises(ModuleNotFoundError, match=r"engine: expected nvalchemi .*e2former-fairchem\[md\].* engine=ase"):
        MDRunner(**common, engine="nvalchemi")
    assert not (tmp_path / "out").exists()


def test_values_of_the_yaml_are_typed(config: Path) -> None:
    composed = get_hydra_config_from_yaml(str(config), ["structure=CH3OH"]).runner
    assert set(composed) == {"_target_", *inspect.signature(MDRunner).parameters}
    with pytest.raises(Exception, match="timestep: expected a number above 0, got 'fast'"):
        get_hydra_config_from_yaml(str(config), ["timestep=fast"]).runner.timestep  # noqa: B018


def test_other_files_are_kept(checkpoint: Path, structures: dict, tmp_path: Path, capfd) -> None:
    (tmp_path / "trajectory.extxyz").write_text("of somebody")
    simulate(checkpoint, tmp_path, structures["water"], steps=2)
    assert (tmp_path / "trajectory.1.extxyz").read_text() == "of somebody"
    there = r"temperature: expected 300.0, of the run in .*, got 400.0; .* job.run_dir=FOLDER"
    with pytest.raises(ValueError, match=there):
        simulate(checkpoint, tmp_path, structures["water"], steps=2, temperature=400)
    with pytest.raises(ValueError, match=r"steps: expected at least 2, .* got 1"):
        simulate(checkpoint, tmp_path, structures["water"], steps=1)
    (tmp_path / "md.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"md.jsonl: expected at least \d+ bytes, as restart.npz says"):
        simulate(checkpoint, tmp_path, structures["water"], steps=4)
    (tmp_path / "restart.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"restart.npz: expected the restart file of a run, got "):
        simulate(checkpoint, tmp_path, structures["water"], steps=4)


def test_a_second_writer_is_refused(checkpoint: Path, structures: dict, tmp_path: Path) -> None:
    """Before it cuts the first one's files to the last restart."""
    simulate(checkpoint, tmp_path / "run", structures["water"], steps=4)
    with (tmp_path / "run" / "md.jsonl").open("a") as log:
        log.write("written since the last restart")
    before = (tmp_path / "run" / "md.jsonl").read_text()
    with claim(tmp_path / "run"), pytest.raises(BlockingIOError, match="got one where another run writes"):
        simulate(checkpoint, tmp_path / "run", structures["water"], steps=8)
    assert (tmp_path / "run" / "md.jsonl").read_text() == before
    simulate(checkpoint, tmp_path / "run", structures["water"], steps=8)
    assert read_log(tmp_path / "run")["step"].tolist() == list(range(9))


@pytest.mark.parametrize(("ensemble", "structure"), [("nve", "water"), ("npt", "crystal")])
def test_engines_agree(ensemble: str, structure: str, checkpoint: Path, structures: dict, tmp_path: Path) -> None:
    """Two implementations of one integrator: energies, temperature, pressure and volume on the way."""
    pytest.importorskip("nvalchemi", reason='not installed: pip install "e2former-fairchem[md]"')
    options = {"ensemble": ensemble, "barostat_time": 1000.0, "timestep": 0.1, "steps": 10, "log_every": 10}
    found = {}
    for engine in ("ase", "nvalchemi"):
        simulate(checkpoint, tmp_path / engine, structures[structure], engine=engine, **options)
        found[engine] = read_log(tmp_path / engine)
    for key in ("potential_energy", "kinetic_energy", "temperature", "pressure", "volume"):
        # barostats differ by the mass of the cell: (3 N + 3) of one, (N + 1) of the other
        tolerance = 1e-5 if ensemble == "nve" else 2e-3
        np.testing.assert_allclose(found["nvalchemi"][key], found["ase"][key], rtol=tolerance, err_msg=key)


def test_batches_of_nvalchemi(checkpoint: Path, structures: dict) -> None:
    """Molecules of different size, charge and spin at once: what fairchem's calculator says of each."""
    pytest.importorskip("nvalchemi", reason='not installed: pip install "e2former-fairchem[md]"')
    from nvalchemi.data import Batch

    from e2former_fairchem.md.nvalchemi_engine import FairchemModel, _data

    settings = prediction.inference_settings("batch")
    predictor = prediction.Predictor(str(checkpoint), "omol", settings, "cpu")
    ion = molecule("NH3")
    ion.info.update(charge=1, spin=2)
    both = [read(structures["crystal"]), ion]
    model = FairchemModel(predictor)
    for order in (both, both[::-1], both[:1]):
        result = model(Batch.from_data_list([_data(atoms) for atoms in order]))
        start = 0
        for n, atoms in enumerate(order):
            atoms.calc = predictor.calculator
            forces = result["forces"][start : start + len(atoms)].numpy()
            assert result["energy"][n].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
            np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-5)
            if atoms.pbc.all():
                np.testing.assert_allclose(result["stress"][n].numpy(), atoms.get_stress(voigt=False), atol=1e-6)
            start += len(atoms)


def test_lines_of_the_page(repo: Path, checkpoint: Path, structures: dict) -> None:
    pytest.importorskip("nvalchemi", reason='not installed: pip install "e2former-fairchem[md]"')
    (lines,) = re.findall(r"```python\n(.*?)```", (repo / "docs" / "md.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(lines.replace("FILE.pt", str(checkpoint)).replace('"cuda"', '"cpu"'), "md.md", "exec"), names)
    assert names["model"].model_config.outputs == {"energy", "forces", "stress"}
