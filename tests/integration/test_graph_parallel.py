"""Graph parallelism: two workers give what one gives, or an error on both."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch
from fairchem.core.common import gp_utils

sys.path.insert(0, str(Path(__file__).parent))
import graph_parallel_worker

NAMES = (
    "auto",
    "on_the_fly",
    "eaas",
    "dense",
    "long range",
    "nearest",
    "checkpointing",
    "given edges",
    "float32",
    "autocast",
    "hessian",
    "one atom",
    "one atom eaas",
    "no edges",
    "by space",
    "direct linear",
    "direct painn",
    "theirs",
    "theirs direct",
    "kernels",
)
# of the largest value of a quantity
TOLERANCE = {"float32": 2e-6, "kernels": 2e-6, "autocast": 2e-2}


def run_workers(folder: Path, device: str, forks: BaseContext) -> dict:
    """What two workers found; see graph_parallel_worker.py."""
    results = folder / "results.pt"
    arguments = str(folder / "store"), str(results), device
    workers = [forks.Process(target=graph_parallel_worker.main, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()  # one that waits for another that failed
            worker.join()
    assert results.is_file(), "see what the workers have printed"
    return torch.load(results)


def check_case(found: dict, name: str) -> None:
    """Energies, forces, stress, and after training the gradients of all workers together.

    Two sums in float32 of other order differ by the rounding of both: workers may be no further from float64 than one.
    """
    alone, together = found["alone"][name], found["together"][name]
    assert alone.keys() == together.keys()
    assert any(key in alone for key in ("energy", "forces"))
    for key, expected in found["exact"].get(name, alone).items():
        scale = max(float(expected.abs().max()), 1e-3)
        error, rounding = (float((one[key].double() - expected).abs().max()) / scale for one in (together, alone))
        assert error < rounding + TOLERANCE.get(name, 1e-10), (key, error, rounding)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forks: BaseContext) -> dict:
    return run_workers(tmp_path_factory.mktemp("workers"), "cpu", forks)


def test_every_case_has_run(found: dict) -> None:
    assert set(found["together"]) == set(found["alone"]) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_give_what_one_gives(found: dict, name: str) -> None:
    check_case(found, name)


def test_the_same_bits_every_time(found: dict) -> None:
    for key, value in found["again"].items():
        assert torch.equal(value, found["together"]["auto"][key]), key


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("different", "expected the same batch on all 2 workers of a group, but they differ in charge, pos"),
        ("not finite", "expected finite coordinates, but atom 1"),
        ("coincident", "atom 0 .* and atom 1"),
    ],
)
def test_an_error_is_raised_by_all_workers(found: dict, case: str, message: str) -> None:
    for errors in found["errors"]:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(errors[case])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    """By hand, on a machine with two GPUs: `pytest -m gpu tests/integration/test_graph_parallel.py`."""
    found = run_workers(tmp_path, "cuda", multiprocessing.get_context("spawn"))  # a fork has no CUDA
    for name in NAMES:
        check_case(found, name)


def test_a_group_of_one_is_no_partition(build, batch_of, structures, tmp_path) -> None:
    model = build()
    data = batch_of(structures["ethanol"])
    expected = model(data.clone())["energy"]["energy"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        gp_utils.setup_graph_parallel_groups(1, "gloo")
        assert gp_utils.initialized()
        assert torch.equal(model(data)["energy"]["energy"], expected)
    finally:
        gp_utils.cleanup_gp()
        torch.distributed.destroy_process_group()


CALCULATOR = textwrap.dedent(
    """
    import sys
    import numpy as np
    import ray
    import torch
    from ase.build import molecule
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.common import distutils
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

    torch.set_num_threads(1)
    checkpoint = sys.argv[1]
    first = molecule("CH3CH2OH")
    first.rattle(0.02, seed=1)
    first.info.update(charge=0, spin=1)
    moved, charged, element = first.copy(), first.copy(), first.copy()
    moved.rattle(0.02, seed=2)
    charged.info.update(charge=1, spin=2)
    element.numbers[0] = 7
    fewer = first[:5]
    fewer.info.update(first.info)
    atoms = {"first": first, "moved": moved, "charge": charged, "element": element, "number": fewer, "again": first}

    def calculator(merge_mole=False, **options):
        settings = InferenceSettings(merge_mole=merge_mole, compile=False, tf32=False)
        return FAIRChemCalculator.from_model_checkpoint(
            checkpoint, task_name="omol", inference_settings=settings, device="cpu", **options
        )

    def evaluate(calc, structure):
        structure = structure.copy()
        structure.calc = calc
        return structure.get_potential_energy(), structure.get_forces(), structure.get_stress()

    def message(function):
        try:
            function()
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error)
        return "no error"

    serial = calculator()
    expected = {name: evaluate(serial, structure) for name, structure in atoms.items()}
    for sent in ("merge_mole", "everything"):

        def check(calc, name):
            for a, b in zip(evaluate(calc, atoms[name]), expected[name], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5)

        def say(what, function):
            print(sent, what, "|", message(function))

        # two processes: fairchem would start one for every core; the dashboard's would take seconds beside them
        ray.init(num_cpus=2, include_dashboard=False)
        parallel = calculator(sent == "merge_mole", workers=2)
        for name in atoms:
            say(name, lambda: check(parallel, name))
        say("serial", lambda: check(serial, "moved"))
        say("direct", lambda: parallel.predictor.predict(parallel.a2g(atoms["charge"])))
        say("after", lambda: check(parallel, "moved"))
        distutils.cleanup_gp_ray()
        say("ended", lambda: check(serial, "first"))
    """
)


@pytest.mark.slow
def test_parallel_calculator(write_checkpoint, tmp_path: Path) -> None:
    """FAIRChemCalculator(workers=2) with inputs that change: the right answer, or an error before anything is sent."""
    pytest.importorskip("ray")
    checkpoint = write_checkpoint(tmp_path / "model.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", CALCULATOR, str(checkpoint)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    said = dict(line.split(" | ", 1) for line in process.stdout.splitlines() if " | " in line)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    for sent in ("merge_mole", "everything"):
        for name in ("first", "moved", "again", "ended"):
            assert said[f"{sent} {name}"] == "no error", (sent, name)
        assert "expected one model for a group of workers, got a second" in said[f"{sent} serial"]
    for name in ("charge", "element", "number", "direct", "after"):
        assert said[f"everything {name}"] == "no error", name
    assert "expected the charge of the first call of this parallel calculator, 0, got 1" in said["merge_mole charge"]
    assert "expected the elements of the first call" in said["merge_mole element"]
    assert "number of atoms of the first call of this parallel calculator, 9, got 5" in said["merge_mole number"]
    assert "expected predictions through FAIRChemCalculator" in said["merge_mole direct"]
    assert "the graph-parallel workers stopped after an error" in said["merge_mole after"]
