"""S2EF submissions: the file's contents, and every way in which a run can be cut short."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.datasets.ase_datasets import AseDBDataset
from fairchem.core.datasets.atomic_data import AtomicData
from omegaconf import OmegaConf

from e2former_fairchem.data.make_sample import write_folder
from e2former_fairchem.heads import E2FormerV2GradientHead
from e2former_fairchem.leaderboard import journal as j
from e2former_fairchem.leaderboard.predictor import Predictor, describe_settings, inference_settings, pack
from e2former_fairchem.leaderboard.runner import IncompleteError, collect, journal_folder
from e2former_fairchem.leaderboard.s2ef import S2EFRunner, force_errors
from e2former_fairchem.leaderboard.s2ef_merge import DuplicateIdError, S2EFReducer
from e2former_fairchem.training.resolvers import sample

SPLIT_OF = {"biomolecules": "biomolecules", "elytes": "electrolytes", "rgd": "neutral_organics"}
LABELS = (*SPLIT_OF, "trans1x", "reactivity")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "inference_ckpt.pt", num_layers=1)


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    """Sample structures under OMol25's `data_id`s."""
    source = AseDBDataset({"src": sample("val_known")})
    found = [source.get_atoms(i) for i in range(20)]
    for i, atoms in enumerate(found):
        atoms.info["data_id"] = LABELS[i % len(LABELS)]
        atoms.info.pop("sid")
    return found


@pytest.fixture(scope="module")
def data(frames: list[Atoms], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s2ef") / "val"
    write_folder(frames, folder)
    return folder


def job(worker: int = 0, workers: int = 1) -> OmegaConf:
    """The part of fairchem's job configuration that runners read, of one task of a SLURM array."""
    return OmegaConf.create(
        {
            "device_type": "CPU",
            "scheduler": {"num_nodes": 1, "ranks_per_node": 1, "num_array_jobs": workers},
            "metadata": {"array_job_num": worker, "commit": "none"},
            "timestamp_id": "launch",
        }
    )


def work(checkpoint: Path, data: Path, output: Path, worker: int = 0, workers: int = 1, **options) -> None:
    keys = {"num_workers": 0, "max_atoms": 24} | options
    runner = S2EFRunner(checkpoint=str(checkpoint), data=str(data), output_dir=str(output), **keys)
    runner.job_config = job(worker, workers)
    runner.run()


def merge(output: Path) -> dict[str, np.ndarray]:
    with np.load(S2EFReducer(str(output)).reduce(), allow_pickle=False) as arrays:
        return dict(arrays)


def slow_work(pause: float, *arguments, **options) -> None:
    """As `work`, in a process of its own that takes its time for each batch."""
    predict = Predictor._predict_once

    def slowly(self, batch):
        time.sleep(pause)
        return predict(self, batch)

    Predictor._predict_once = slowly
    work(*arguments, **options)
    os._exit(0)  # a fork of pytest must not run pytest's exit handlers


def start(pause: float, *arguments, **options) -> multiprocessing.Process:
    torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads and would wait for them
    process = multiprocessing.get_context("fork").Process(target=slow_work, args=(pause, *arguments), kwargs=options)
    process.start()
    return process


def computed(output: Path) -> list[int]:
    """Every index that any journal holds a result of, with repetitions."""
    paths = j.journals(journal_folder(output))
    return [i for p in paths for r in j.read_records(p) if r.kind == j.Kind.RESULT for i in r.indices.tolist()]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """An undisturbed run of one worker: folder and arrays."""
    output = tmp_path_factory.mktemp("whole")
    work(checkpoint, data, output)
    return output, merge(output)


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got["ids"].tolist() == expected["ids"].tolist()
    np.testing.assert_array_equal(got["natoms"], expected["natoms"])
    for name, tolerance in (("energy", 1e-4), ("forces", 1e-4)):  # batches differ, and with them float32 rounding
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=tolerance)


def test_command_writes_the_file_that_the_leaderboard_takes(
    launch: Callable, repo: Path, checkpoint: Path, data: Path, frames: list[Atoms], elsewhere: Path
) -> None:
    """One command; equal to fairchem's calculator on each structure alone; with scores of each part."""
    from fairchem.core import FAIRChemCalculator

    launch(
        repo / "configs" / "leaderboard" / "s2ef.yaml",
        f"checkpoint={checkpoint}",
        f"data={data}",
        "job.device_type=CPU",
        "job.run_dir=out",
        "max_atoms=40",
        "num_workers=1",
    )
    with np.load(elsewhere / "out" / "s2ef_predictions.npz", allow_pickle=False) as arrays:
        got = dict(arrays)
    assert sorted(got) == ["energy", "forces", "ids", "natoms"]
    assert got["ids"].dtype.kind == "U"
    assert got["energy"].dtype == got["forces"].dtype == np.float64
    assert got["natoms"].dtype == np.int64
    assert got["ids"].tolist() == [a.info["source"] for a in frames]
    assert got["natoms"].tolist() == [len(a) for a in frames]

    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(checkpoint), task_name="omol", device="cpu", inference_settings="batch"
    )
    rows = np.split(got["forces"], np.cumsum(got["natoms"])[:-1])
    absolute = {}
    for atoms, energy, forces in zip(frames, got["energy"], rows, strict=True):
        alone = atoms.copy()
        alone.calc = calculator
        assert energy == pytest.approx(alone.get_potential_energy(), abs=1e-3)
        np.testing.assert_allclose(forces, alone.get_forces(), atol=1e-4)
        part = {"trans1x": "neutral_organics"} | SPLIT_OF
        for name in {"all", part.get(atoms.info["data_id"], "all")}:
            absolute.setdefault(name, []).append(
                (abs(energy - atoms.get_potential_energy()), np.abs(forces - atoms.get_forces()))
            )

    scores = json.loads((elsewhere / "out" / "scores.json").read_text())
    assert set(scores) == set(absolute) == {"all", "biomolecules", "electrolytes", "neutral_organics"}
    for name, errors in absolute.items():
        assert scores[name]["structures"] == len(errors)
        assert scores[name]["energy_mae"] == pytest.approx(np.mean([e for e, _ in errors]), rel=1e-6)
        assert scores[name]["forces_mae"] == pytest.approx(np.concatenate([f for _, f in errors]).mean(), rel=1e-6)

    provenance = json.loads((elsewhere / "out" / "s2ef_predictions.npz.provenance.json").read_text())
    assert provenance["structures"] == 20
    assert len(provenance["checkpoint_sha256"]) == 64
    assert provenance["workers"][0]["packages"]["fairchem-core"].startswith("2.")
    assert str(checkpoint.parent) not in json.dumps(provenance)


def test_killed_run_goes_on(checkpoint: Path, data: Path, tmp_path: Path, whole: tuple) -> None:
    """SIGKILL in the middle, a reader left behind; then nothing is lost and nothing computed twice."""
    process = start(0.05, checkpoint, data, tmp_path, num_workers=1)
    deadline = time.monotonic() + 180
    while len(computed(tmp_path)) < 6:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = computed(tmp_path)
    assert 6 <= len(before) < 20
    (path,) = j.journals(journal_folder(tmp_path))
    with pytest.raises(IncompleteError, match=r"20 structures, got \d+: 0 failed, \d+ are not computed yet"):
        merge(tmp_path)
    assert not (tmp_path / "s2ef_predictions.npz").exists()

    work(checkpoint, data, tmp_path)
    assert computed(tmp_path)[: len(before)] == before
    assert sorted(computed(tmp_path)) == list(range(20))
    assert_same(merge(tmp_path), whole[1])
    assert json.loads((tmp_path / "s2ef_predictions.npz.provenance.json").read_text())["computed_more_than_once"] == 0

    size = path.stat().st_size
    work(checkpoint, data, tmp_path)  # nothing is left to do
    assert path.stat().st_size == size


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_corrupt_journal_tail(
    damage: str, checkpoint: Path, data: Path, tmp_path: Path, whole: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    folder = journal_folder(tmp_path)
    folder.mkdir()
    path = folder / "worker-0000.journal"
    good = (journal_folder(whole[0]) / path.name).read_bytes()
    broken = {
        "cut": good[:-100],
        "flipped": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "garbage": good + b"\x00" * 37,
    }[damage]
    path.write_bytes(broken)
    left = len(computed(tmp_path))
    assert left == (20 if damage == "garbage" else left)
    with caplog.at_level(logging.WARNING):
        work(checkpoint, data, tmp_path)
    assert "are no whole record" in caplog.text
    assert len(list(folder.glob("*.damaged-*"))) == 1
    assert sorted(computed(tmp_path)) == list(range(20))
    assert_same(merge(tmp_path), whole[1])


def test_two_workers_one_killed_then_one(checkpoint: Path, data: Path, tmp_path: Path, whole: tuple) -> None:
    """Two at once; one is killed; a single worker does the rest of both shares."""
    first, second = (start(0.05, checkpoint, data, tmp_path, worker, 2) for worker in (0, 1))
    second_journal = journal_folder(tmp_path) / "worker-0001.journal"
    deadline = time.monotonic() + 180
    while not second_journal.exists() or sum(1 for _ in j.read_records(second_journal)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.kill()
    second.join()
    first.join(60)
    assert first.exitcode == 0
    done = computed(tmp_path)
    assert set(range(0, 20, 2)) < set(done)
    assert len(done) < 20
    work(checkpoint, data, tmp_path)
    assert sorted(computed(tmp_path)) == list(range(20))
    assert_same(merge(tmp_path), whole[1])
    assert len(collect(tmp_path).workers) == 2


@pytest.mark.slow
def test_two_local_processes(
    launch: Callable, repo: Path, checkpoint: Path, data: Path, tmp_path: Path, whole: tuple
) -> None:
    """As on a machine with two GPUs: one command, and the process that ends last merges."""
    launch(
        repo / "configs" / "leaderboard" / "s2ef.yaml",
        f"checkpoint={checkpoint}",
        f"data={data}",
        f"job.run_dir={tmp_path}",
        "job.device_type=CPU",
        "job.scheduler.ranks_per_node=2",
        "num_workers=0",
    )
    with np.load(tmp_path / "s2ef_predictions.npz") as arrays:
        assert_same(dict(arrays), whole[1])
    provenance = json.loads((tmp_path / "s2ef_predictions.npz.provenance.json").read_text())
    assert [worker["worker"] for worker in provenance["workers"]] == [0, 1]


def test_last_worker_merges(checkpoint: Path, data: Path, tmp_path: Path, whole: tuple) -> None:
    merged = tmp_path / "s2ef_predictions.npz"
    work(checkpoint, data, tmp_path, 0, 2, reducer=S2EFReducer(str(tmp_path)))
    assert not merged.exists()
    work(checkpoint, data, tmp_path, 1, 2, reducer=S2EFReducer(str(tmp_path)))
    with np.load(merged) as arrays:
        assert_same(dict(arrays), whole[1])
    merged.unlink()
    work(checkpoint, data, tmp_path, 0, 2, reducer=S2EFReducer(str(tmp_path)))
    assert not merged.exists()  # the same launch merges once


def test_journal_belongs_to_one_run_and_one_writer(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    whole: tuple,
    write_checkpoint: Callable[..., Path],
) -> None:
    other = write_checkpoint(tmp_path / "other.pt", num_layers=2)
    with pytest.raises(j.JournalError, match=r"checkpoint_sha256: expected '\w+', got '\w+'.*job\.run_dir"):
        work(other, data, whole[0])
    with pytest.raises(j.JournalError, match="task_name|inference"):
        work(checkpoint, data, whole[0], inference={"tf32": True})
    path = journal_folder(whole[0]) / "worker-0000.journal"
    fingerprint = j.read_header(path)["fingerprint"]
    with j.Journal(path, fingerprint), pytest.raises(j.JournalError, match="still running"):
        j.Journal(path, fingerprint, wait=0.0)


def test_structures_computed_twice_count_once(checkpoint: Path, data: Path, tmp_path: Path, whole: tuple) -> None:
    work(checkpoint, data, tmp_path)
    folder = journal_folder(tmp_path)
    (folder / "worker-0007.journal").write_bytes((folder / "worker-0000.journal").read_bytes())
    assert_same(merge(tmp_path), whole[1])
    assert json.loads((tmp_path / "s2ef_predictions.npz.provenance.json").read_text())["computed_more_than_once"] == 20


def test_duplicate_id(checkpoint: Path, frames: list[Atoms], tmp_path: Path) -> None:
    write_folder([*frames[:3], frames[1]], tmp_path / "val")
    work(checkpoint, tmp_path / "val", tmp_path / "out")
    with pytest.raises(DuplicateIdError, match=f"expected 4 different ids.*{frames[1].info['source']}"):
        merge(tmp_path / "out")
    assert not (tmp_path / "out" / "s2ef_predictions.npz").exists()


class FragileHead(E2FormerV2GradientHead):
    """Refuses structures of as many atoms as the environment's REFUSED; the energy of INFINITE atoms is infinite."""

    def forward(self, data: AtomicData, emb: dict) -> dict:
        natoms = data["natoms"]
        if int(os.environ.get("REFUSED", 0)) in natoms.tolist():
            raise RuntimeError("no memory for this one")
        found = super().forward(data, emb)
        infinite = natoms == int(os.environ.get("INFINITE", 0))
        found["energy"]["energy"] = found["energy"]["energy"].masked_fill(infinite, math.inf)
        return found


def test_failures_are_recorded_counted_and_retried(
    write_checkpoint: Callable[..., Path], frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A structure without charge, one that the model refuses within a batch, and one with a prediction that is none."""
    six = list({len(atoms): atoms for atoms in frames}.values())[:6]
    uncharged = six[2].copy()
    uncharged.info.pop("charge")
    write_folder([*six[:2], uncharged, *six[3:]], tmp_path / "val")
    heads = {"efs": {"module": f"{__name__}.FragileHead"}}
    checkpoint, output = write_checkpoint(tmp_path / "fragile.pt", heads=heads, num_layers=1), tmp_path / "out"
    with monkeypatch.context() as environment:
        environment.setenv("REFUSED", str(len(six[4])))
        environment.setenv("INFINITE", str(len(six[5])))
        work(checkpoint, tmp_path / "val", output, max_atoms=1000)
    with pytest.raises(IncompleteError, match=r"got \d: \d failed \(reasons in .*failures.json; retry_failed=true"):
        merge(output)
    failures = {f["index"]: f["error"] for f in json.loads((output / "failures.json").read_text())}
    assert "expected source, charge, spin, got none of charge" in failures[2]
    assert failures[4] == "RuntimeError: no memory for this one"
    assert failures[5] == "PredictionError: expected finite numbers, got energy inf and 0 bad force components"

    size = len(computed(output))
    work(checkpoint, tmp_path / "val", output)
    assert len(computed(output)) == size  # failed ones are not tried again unless asked
    work(checkpoint, tmp_path / "val", output, retry_failed=True)
    assert sorted(computed(output)) == [0, 1, 3, 4, 5]
    with pytest.raises(IncompleteError, match="got 5: 1 failed"):
        merge(output)


def test_labels_are_not_needed(
    checkpoint: Path,
    frames: list[Atoms],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    """Labels of one structure, of half a structure, of the wrong shape and in `info`, in one batch: all predicted."""
    mixed = [atoms.copy() for atoms in frames[:5]]  # without a calculator
    size = len(mixed[2])
    mixed[1].calc = SinglePointCalculator(mixed[1], energy=-1.0)
    mixed[2].calc = SinglePointCalculator(mixed[2], energy=-1.0, forces=np.ones((size, 2)))
    mixed[3].info["energy"] = -3.0
    mixed[4].calc = SinglePointCalculator(mixed[4], energy=2.0, forces=np.zeros((len(mixed[4]), 3)))
    write_folder(mixed, tmp_path / "val")
    output = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        work(checkpoint, tmp_path / "val", output, max_atoms=1000)
        arrays = merge(output)
    assert "trying halves" not in caplog.text
    assert (
        f"{mixed[2].info['source']} counts as unlabelled: expected forces ({size}, 3), got ({size}, 2)" in caplog.text
    )
    assert "which 1 of 5 structures have" in capsys.readouterr().out
    scores = json.loads((output / "scores.json").read_text())
    assert scores["all"]["structures"] == 1
    assert scores["all"]["energy_mae"] == pytest.approx(abs(arrays["energy"][4] - 2.0))

    bare = [atoms.copy() for atoms in mixed]
    for atoms in bare:
        atoms.info.pop("energy", None)
    write_folder(bare, tmp_path / "bare")
    work(checkpoint, tmp_path / "bare", tmp_path / "without", max_atoms=1000)
    without = merge(tmp_path / "without")
    np.testing.assert_array_equal(arrays["energy"], without["energy"])
    np.testing.assert_array_equal(arrays["forces"], without["forces"])


def test_one_bad_structure_fails_alone(
    checkpoint: Path, frames: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without atoms, one that cannot be collated, one whose exception cannot be pickled; no metadata; a reader."""

    class Unpicklable(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    convert = Predictor.convert

    def spoiling(self: Predictor, atoms: Atoms):
        if atoms.info["source"] == frames[3].info["source"]:
            raise Unpicklable(1, 2)
        graph = convert(self, atoms)
        if atoms.info["source"] == frames[5].info["source"]:
            graph.pos = graph.pos[:, :2]
        return graph

    empty = Atoms(info=frames[1].info)
    write_folder([frames[0], empty, *frames[2:8]], tmp_path / "val")
    (tmp_path / "val" / "metadata.npz").unlink()
    with lmdb.open(str(tmp_path / "val" / "data.aselmdb"), subdir=False) as file, file.begin(write=True) as rows:
        rows.put(b"7", rows.get(b"7")[:-20])  # rows count from 1
    monkeypatch.setattr(Predictor, "convert", spoiling)
    output = tmp_path / "out"
    work(checkpoint, tmp_path / "val", output, max_atoms=1000, num_workers=1)
    with pytest.raises(IncompleteError, match="expected results of 8 structures, got 4: 4 failed"):
        merge(output)
    failures = {f["index"]: f for f in json.loads((output / "failures.json").read_text())}
    assert {i: f["name"] for i, f in failures.items()} == {
        **{i: frames[i].info["source"] for i in (1, 3, 5)},
        6: "structure 6",
    }
    assert failures[1]["error"] == "ValueError: expected at least one atom, got an empty structure"
    assert failures[3]["error"] == "Unpicklable: 1 and 2"
    assert re.fullmatch(r"AssertionError at atomic_data.py:\d+: assert .*pos.*", failures[5]["error"])
    assert re.match(r"(zlib\.)?error.*: Error -5 while decompressing data", failures[6]["error"])
    assert sorted(computed(output)) == [0, 2, 4, 7]


def test_wrong_keys_are_named(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"max_atoms": 0}, "max_atoms: expected a positive integer, got 0"),
        ({"inference": "default"}, "inference: expected settings for batches of different molecules"),
        ({"inference": {"tf23": True}}, "inference: expected keys of fairchem's InferenceSettings, got tf23"),
        ({"inference": "fast"}, "inference: expected a preset's name"),
    ):
        with pytest.raises(ValueError, match=message):
            work(checkpoint, data, tmp_path, **options)
    with pytest.raises(ValueError, match=r"task_name: expected one of omol, got 'oc20'"):
        work(checkpoint, data, tmp_path, task_name="oc20")
    with pytest.raises(FileNotFoundError, match="checkpoint: expected an inference checkpoint's file"):
        work(tmp_path / "none.pt", data, tmp_path)


def test_inference_settings_from_the_command_line() -> None:
    """`inference={tf32: true}` arrives as OmegaConf's own dictionary."""
    settings = inference_settings(OmegaConf.create({"tf32": True, "base_precision_dtype": "float64"}))
    assert settings.tf32
    assert not settings.compile
    json.dumps(describe_settings(settings))


def test_pack() -> None:
    natoms = [5, 1, 9, 3, 30, 1, 4, 4]
    batches = pack(natoms, 10)
    assert sorted(i for b in batches for i in b) == list(range(8))
    assert all(sum(natoms[i] for i in b) <= 10 or len(b) == 1 for b in batches)
    assert all(len(b) == 1 for b in batches if any(natoms[i] == 1 for i in b))
    assert pack([], 10) == []


def test_force_errors() -> None:
    a, b = np.array([[1.0, 0, 0], [0, 2, 0]]), np.array([[1.0, 0, 0], [0, 0, 0]])
    assert force_errors(a, b) == (2.0, 1.0)
    assert np.isnan(force_errors(a, None)).all()
