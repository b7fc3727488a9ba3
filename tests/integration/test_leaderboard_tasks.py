"""The seven evaluation tasks: the same results as fairchem's own recipes, in shards, after kills and failures."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from omegaconf import OmegaConf

from e2former_fairchem.files import read_json
from e2former_fairchem.leaderboard import journal as j
from e2former_fairchem.leaderboard.check_submission import check
from e2former_fairchem.leaderboard.evaluate import EvaluationRunner
from e2former_fairchem.leaderboard.evaluate_merge import EvaluationReducer
from e2former_fairchem.leaderboard.predictor import Predictor
from e2former_fairchem.leaderboard.recipes import EVAL_OPT_PARAMETERS
from e2former_fairchem.leaderboard.runner import IncompleteError, journal_folder
from e2former_fairchem.leaderboard.tasks import TASKS, leaves, load_inputs
from e2former_fairchem.training.resolvers import sample

RECIPES = {name: name for name in TASKS} | {"spingap": "spin_gap"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "inference_ckpt.pt", num_layers=1)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relaxations of four steps, for fairchem's recipe too."""
    monkeypatch.setitem(EVAL_OPT_PARAMETERS, "max_steps", 4)


def charged(atoms: Atoms, charge: int, spin: int) -> Atoms:
    copy = atoms.copy()
    copy.info = {"charge": charge, "spin": spin}
    return copy


def moved(atoms: Atoms, seed: int) -> Atoms:
    copy = charged(atoms, 0, 1)
    copy.rattle(0.03, seed=seed)
    return copy


def make_inputs() -> dict[str, Any]:
    """Inputs of the seven tasks, laid out as the leaderboard's pickles, from structures of the bundled sample."""
    from fairchem.core.datasets.ase_datasets import AseDBDataset

    source = AseDBDataset({"src": sample("val_known")})
    found = [source.get_atoms(i) for i in range(len(source))]
    dimer = next(a for a in found if "Water_dimer" in a.info["source"])
    by_size = {len(a): charged(a, 0, 1) for a in found if a.info["charge"] == 0}
    first, second, third = by_size[4], by_size[5], by_size[3]
    oxygens = np.flatnonzero(dimer.numbers == 8)
    ligand, pocket = (np.flatnonzero(dimer.get_distances(o, range(6)) < 1.3) for o in oxygens)
    curve = {}
    for name, far in (("short_range_scaled_complex_0.9", -0.2), ("short_range_scaled_complex_1.0", 0.0)):
        curve[name] = charged(dimer, 0, 1)
        curve[name].positions[pocket] += far * np.array([1.0, 0, 0])
    for name, far in (("long_range_scaled_complex_2.0", 4.0), ("long_range_scaled_complex_3.0", 8.0)):
        curve[name] = charged(dimer, 0, 1)
        curve[name].positions[pocket] += far * np.array([1.0, 0, 0])
    return {
        "ligand_pocket": {
            "1abc": {
                "ligand": charged(dimer[ligand], 0, 1),
                "pocket": charged(dimer[pocket], 0, 1),
                "ligand_pocket": charged(dimer, 0, 1),
            }
        },
        "ligand_strain": {"lig": {"bioactive_conf": first, "conformers": [moved(first, 1), moved(first, 2)]}},
        "conformers": {
            "family_a": [{"sid": f"a{i}", "initial_atoms": moved(first, i), "final_atoms": first} for i in range(3)],
            "family_b": [{"sid": f"b{i}", "initial_atoms": moved(second, i), "final_atoms": second} for i in range(2)],
        },
        "protonation": {
            "acid": {
                "acid_0_1": {"initial_atoms": moved(third, 1), "final_atoms": third},
                "acid_-1_1": {"initial_atoms": charged(third[1:], -1, 1), "final_atoms": charged(third[1:], -1, 1)},
            }
        },
        "ieea": {
            7: {
                -1: {2: {"atoms": charged(first, -1, 2)}, 4: {"atoms": charged(first, -1, 4)}},
                0: {1: {"atoms": charged(first, 0, 1)}},
                1: {2: {"atoms": charged(first, 1, 2)}},
            }
        },
        "spingap": {"gap": {1: {"atoms": charged(second, 0, 1)}, 3: {"atoms": charged(second, 0, 3)}}},
        "distance_scaling": {"biomolecules": {"dimer": curve}},
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pickles by task."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = {}
    for name, content in make_inputs().items():
        paths[name] = folder / f"{name}.pkl"
        paths[name].write_bytes(pickle.dumps(content))
    return paths


def work(task: str, checkpoint: Path, data: Path, output: Path, worker: int = 0, workers: int = 1, **options) -> None:
    keys = {"max_atoms": 12} | options
    runner = EvaluationRunner(task, str(data), checkpoint=str(checkpoint), output_dir=str(output), **keys)
    runner.job_config = job(worker, workers)
    runner.run()


def job(worker: int = 0, workers: int = 1) -> OmegaConf:
    return OmegaConf.create(
        {
            "device_type": "CPU",
            "scheduler": {"num_nodes": 1, "ranks_per_node": 1, "num_array_jobs": workers},
            "metadata": {"array_job_num": worker, "commit": "none", "results_dir": "unused"},
            "run_name": "run",
            "debug": False,
            "logger": None,
        }
    )


def merge(task: str, output: Path, labels: Path | None = None) -> Path:
    reducer = EvaluationReducer(task, str(output), labels=None if labels is None else str(labels))
    reducer.job_config = job()
    reducer.reduce()
    return output / f"{task}_results.json.gz"


def by_fairchem(task: str, checkpoint: Path, data: Path) -> Any:
    """What fairchem's recipe writes for this input."""
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.components.calculate.recipes import omol

    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(checkpoint), task_name="omol", device="cpu", inference_settings="batch"
    )
    return json.loads(json.dumps(getattr(omol, RECIPES[task])(pickle.loads(data.read_bytes()), calculator)))


def assert_close(got: Any, expected: Any, place: str = "") -> None:
    """Equal trees; numbers and positions up to float32 rounding, which relaxations amplify."""
    if isinstance(expected, dict) and "atoms_json" in expected:
        from pymatgen.io.ase import MSONAtoms

        mine, theirs = MSONAtoms.from_dict(got), MSONAtoms.from_dict(expected)
        assert mine.info == theirs.info, place
        assert mine.numbers.tolist() == theirs.numbers.tolist(), place
        np.testing.assert_allclose(mine.positions, theirs.positions, atol=2e-4, err_msg=place)
    elif isinstance(expected, dict):
        assert list(got) == list(expected), place
        for key in expected:
            assert_close(got[key], expected[key], f"{place}/{key}")
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-3, err_msg=place)


@pytest.mark.parametrize("task", TASKS)
def test_same_as_fairchems_recipe(task: str, checkpoint: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    """Two workers that share top-level keys; the file passes the check; scores are those of fairchem's evaluator."""
    for worker in (0, 1):
        work(task, checkpoint, inputs[task], tmp_path, worker, 2)
    expected = by_fairchem(task, checkpoint, inputs[task])
    labels = tmp_path / "labels.json.gz"
    labels.write_bytes(gzip.compress(json.dumps(expected).encode()))
    result = merge(task, tmp_path, labels)
    assert_close(json.loads(gzip.decompress(result.read_bytes())), expected)
    for reference in (inputs[task], labels):
        report = check(result, task, reference)
        assert not report.problems, str(report)

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores
    assert max(abs(v) for v in scores.values()) < 5e-3, scores
    provenance = json.loads((tmp_path / f"{result.name}.provenance.json").read_text())
    units = load_inputs(task, inputs[task])
    assert provenance["structures"] == len(units)
    assert provenance["relaxations"] == sum(u.relax for u in units)
    assert [w["worker"] for w in provenance["workers"]] == [0, 1]


@pytest.mark.parametrize("task", ["ligand_strain"])
def test_one_after_another(task: str, checkpoint: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    """`batched: false` calls fairchem's recipe itself."""
    work(task, checkpoint, inputs[task], tmp_path, batched=False)
    assert_close(read_json(merge(task, tmp_path)), by_fairchem(task, checkpoint, inputs[task]))


def test_command(launch: Callable, repo: Path, checkpoint: Path, inputs: dict[str, Path], elsewhere: Path) -> None:
    task = "distance_scaling"
    launch(
        repo / "configs" / "leaderboard" / f"{task}.yaml",
        f"checkpoint={checkpoint}",
        f"data={inputs[task]}",
        "job.device_type=CPU",
    )
    result = elsewhere / "runs" / "leaderboard" / task / f"{task}_results.json.gz"
    assert not check(result, task, inputs[task]).problems


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("where", ["local", "slurm"])
def test_configs_compose(task: str, where: str, repo: Path) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    config = get_hydra_config_from_yaml(str(repo / "configs" / "leaderboard" / f"{task}.yaml"), [f"job={where}"])
    assert config.runner.task == config.runner.reducer.task == task
    assert config.runner.output_dir == config.runner.reducer.output_dir == config.job.run_dir
    assert config.job.scheduler.num_array_jobs == {"local": 1, "slurm": 8}[where]


def slow_work(*arguments) -> None:
    predict = Predictor._predict_once

    def slowly(self, batch):
        time.sleep(0.05)
        return predict(self, batch)

    Predictor._predict_once = slowly
    work(*arguments)
    os._exit(0)


def computed(output: Path) -> list[int]:
    paths = j.journals(journal_folder(output))
    return [i for p in paths for r in j.read_records(p) if r.kind == j.Kind.RESULT for i in r.indices.tolist()]


def test_killed_run_goes_on(checkpoint: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL between the relaxations of one family: the others are not relaxed again."""
    task = "conformers"
    torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads and would wait for them
    process = multiprocessing.get_context("fork").Process(
        target=slow_work, args=(task, checkpoint, inputs[task], tmp_path)
    )
    process.start()
    deadline = time.monotonic() + 180
    while len(computed(tmp_path)) < 2:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = computed(tmp_path)
    assert 2 <= len(before) < 5
    with pytest.raises(IncompleteError, match="are not computed yet"):
        merge(task, tmp_path)
    with (journal_folder(tmp_path) / "worker-0000.journal").open("ab") as handle:
        handle.write(b"E2FJ\x01 half a record")
    work(task, checkpoint, inputs[task], tmp_path)
    assert sorted(computed(tmp_path)) == list(range(5))
    assert computed(tmp_path)[: len(before)] == before
    assert_close(read_json(merge(task, tmp_path)), by_fairchem(task, checkpoint, inputs[task]))


@pytest.mark.parametrize("batched", [True, False])
def test_exceptions_are_recorded_and_counted(
    batched: bool, checkpoint: Path, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One relaxation breaks in its third step, another one at once."""
    task = "conformers"
    units = load_inputs(task, inputs[task])
    late, never = len(units[0].atoms), len(units[-1].atoms)
    assert late != never
    from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit

    predict, calls = MLIPPredictUnit.predict, {"late": 0}

    def fragile(self, batch, *arguments):
        sizes = batch.natoms.tolist()
        if never in sizes:
            raise RuntimeError("refused at once")
        if sizes == [late]:
            calls["late"] += 1
            if calls["late"] == 3:
                raise RuntimeError("refused in the third step")
        return predict(self, batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MLIPPredictUnit, "predict", fragile)
        work(task, checkpoint, inputs[task], tmp_path, batched=batched, max_atoms=1)
    with pytest.raises(IncompleteError, match="expected results of 5 structures, got 3: 2 failed"):
        merge(task, tmp_path)
    failures = json.loads((tmp_path / "failures.json").read_text())
    assert [f["name"] for f in failures] == ["family_b/b0", "family_b/b1"]
    assert all(f["error"] == "RuntimeError: refused at once" for f in failures)

    work(task, checkpoint, inputs[task], tmp_path, batched=batched, retry_failed=True)
    result = merge(task, tmp_path)
    assert not (tmp_path / "failures.json").exists()
    (warning,) = json.loads((tmp_path / "warnings.json").read_text())
    assert warning["error"] == "RuntimeError: refused in the third step"
    provenance = json.loads((tmp_path / f"{result.name}.provenance.json").read_text())
    assert provenance["relaxations_ended_by_an_exception"] == 1
    assert not check(result, task, inputs[task]).problems


@pytest.mark.parametrize(("task", "batched"), [("spingap", True), ("conformers", True), ("conformers", False)])
def test_one_bad_structure_fails_alone(task: str, batched: bool, checkpoint: Path, tmp_path: Path) -> None:
    """Info that is no JSON (NaN), a structure without atoms; a label beside structures without is no harm."""
    content = make_inputs()[task]
    members = content["family_a" if task == "conformers" else "gap"]
    if task == "spingap":
        members |= {spin: {"atoms": members[1]["atoms"].copy()} for spin in (5, 7)}
        units = [member["atoms"] for member in members.values()]
        names = ["gap/3", "gap/5"]
    else:
        units = [member["initial_atoms"] for member in members]
        names = ["family_a/a1", "family_a/a2"]
    units[0].info["energy"] = -1.0
    units[1].info["gap"] = float("nan")
    del units[2][:]
    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps(content))
    work(task, checkpoint, tmp_path / "inputs.pkl", tmp_path / "out", batched=batched, max_atoms=1000)
    total = len(load_inputs(task, tmp_path / "inputs.pkl"))
    with pytest.raises(IncompleteError, match=f"of {total} structures, got {total - 2}: 2 failed"):
        merge(task, tmp_path / "out")
    failures = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert [f["name"] for f in failures] == names
    assert "not JSON compliant" in failures[0]["error"], failures
    assert "ValueError: " in failures[1]["error"], failures


def test_wrong_inputs_are_named(checkpoint: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    twice = make_inputs()["conformers"]
    twice["family_a"][1]["sid"] = "a0"
    (tmp_path / "twice.pkl").write_bytes(pickle.dumps(twice))
    (tmp_path / "cut.pkl").write_bytes(inputs["ieea"].read_bytes()[:50])
    for task, data, message in (
        ("conformers", tmp_path / "twice.pkl", "expected each key once, got family_a/a0 twice"),
        ("conformers", inputs["ieea"], "expected the input of conformers"),
        ("ieea", tmp_path / "cut.pkl", "data: expected the input pickle of ieea"),
        ("iea", inputs["ieea"], "task: expected one of ligand_pocket, .*, got 'iea'"),
    ):
        with pytest.raises(ValueError, match=message):
            work(task, checkpoint, data, tmp_path)


def test_labels_of_something_else_are_refused_first(inputs: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    """Before anything is computed, with both numbers and one of each; some of the labels alone are fine."""
    result = {"energy": -1.0}
    labels = tmp_path / "labels.json"
    labels.write_text("{}}")
    with pytest.raises(ValueError, match="labels: .*labels.json: expected JSON"):
        EvaluationReducer("spingap", str(tmp_path), str(labels))
    labels.write_text(json.dumps({"gap": {"1": result}, "other": {"1": result, "3": result}}))
    message = (
        r"expected calculations among the 2 of the input, like gap/\d, got 3 in .*, of which 2 are others, like other/1"
    )
    with pytest.raises(ValueError, match=message):
        work(
            "spingap",
            checkpoint,
            inputs["spingap"],
            tmp_path,
            reducer=EvaluationReducer("spingap", str(tmp_path), labels),
        )
    assert not journal_folder(tmp_path).exists()
    EvaluationReducer("spingap", str(tmp_path), labels).check_labels(
        {("gap", "1"), *((k, s) for k in ("other", "gap") for s in "13")}
    )


def test_leaves_name_what_is_no_result() -> None:
    with pytest.raises(ValueError, match="a/b: expected an object with results, got list"):
        dict(leaves({"a": {"b": []}}))
