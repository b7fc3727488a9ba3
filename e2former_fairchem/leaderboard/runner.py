"""One worker's share of a leaderboard task: what is left of it, its journal, its progress. And the merge's base.

Workers are the ranks of one local run or the tasks of a SLURM array; together they are numbered 0..n-1, and structure i
belongs to worker i modulo n. A later run may have another number of workers: all journals of the folder count.

The worker that finishes last merges, so that a merge needs neither another launch nor all workers at the same time.
(fairchem 2.24's own further launch, for a `reducer:` at the top of a config, dies where a local run has several ranks:
torch's launcher turns the enumeration `RunType.REDUCE` into a plain string on the way.)
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.components.reducer import Reducer
from fairchem.core.components.runner import Runner
from omegaconf import DictConfig

from e2former_fairchem.files import sha256_of, write_json
from e2former_fairchem.leaderboard import journal as j
from e2former_fairchem.leaderboard.predictor import Predictor, check_model, describe_settings, inference_settings
from e2former_fairchem.leaderboard.provenance import environment
from e2former_fairchem.training.signals import end_on_signal

FORMAT = 1


class IncompleteError(RuntimeError):
    """Structures without a result, so that there is nothing to upload yet."""


def journal_folder(output_dir: str | Path) -> Path:
    """Where the journals of a run lie."""
    return Path(output_dir) / "journal"


class Progress:
    """Logs what is done, the rate and the time left, at most every `every` seconds.

    Args:
        label: what the lines start with.
        sizes: number of atoms of each structure that this process still has to do.
        done: number of structures of this worker that were done before.
        every: seconds between two lines.
    """

    def __init__(self, label: str, sizes: Mapping[int, int], done: int, every: float) -> None:
        self.label, self.every = label, every
        self.before, self.number = done, len(sizes)
        self._atoms = dict(sizes)
        self.total_atoms = sum(self._atoms.values())
        self.done = self.failed = self.done_atoms = 0
        self._start = self._last = time.monotonic()

    def add(self, indices: Sequence[int], failed: int = 0) -> None:
        """Count structures as done, the failed ones among them."""
        self.done += len(indices)
        self.failed += failed
        self.done_atoms += sum(self._atoms[i] for i in indices)
        if time.monotonic() - self._last > self.every or self.done == self.number:
            self._last = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """The line for now."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = seconds * (self.total_atoms - self.done_atoms) / max(self.done_atoms, 1)
        total = self.before + self.number
        share = 100 * (self.before + self.done) / max(total, 1)
        return (
            f"{self.label}: {self.before + self.done}/{total} structures ({share:.1f} %), {self.failed} failed, "
            f"{self.done_atoms / seconds:.3g} atoms/s, {datetime.timedelta(seconds=round(seconds))} passed, "
            f"{datetime.timedelta(seconds=round(left))} left"
        )


class JournalledRunner(Runner):
    """Base of the runners: subclasses tell the structures, and predict those that they are asked for.

    Args:
        task: name of the leaderboard task.
        checkpoint: path of an inference checkpoint, or the name of a model that fairchem downloads.
        output_dir: folder of the run; a run that finds its own journals there goes on.
        task_name: data set of the checkpoint whose tasks are predicted.
        inference: preset of fairchem's inference settings, or changes of the preset `batch`.
        max_atoms: number of atoms of a batch.
        retry_failed: compute structures again that failed before.
        log_every: seconds between two lines of progress.
        reducer: merges the journals when all workers are done; None: nobody merges.

    Raises:
        ValueError, FileNotFoundError: a wrong value, before anything heavy starts.
    """

    def __init__(
        self,
        task: str,
        checkpoint: str | None,
        output_dir: str,
        task_name: str = "omol",
        inference: str | dict[str, Any] | DictConfig = "batch",
        max_atoms: int = 2048,
        retry_failed: bool = False,
        log_every: float = 30.0,
        reducer: Reducer | None = None,
    ) -> None:
        if isinstance(max_atoms, bool) or not isinstance(max_atoms, int) or max_atoms < 1:
            raise ValueError(f"max_atoms: expected a positive integer, got {max_atoms!r}")
        self.task = task
        self.checkpoint = check_model(checkpoint)
        self.output_dir = Path(output_dir).absolute()
        self.task_name = task_name
        self.settings = inference_settings(inference)
        self.max_atoms = max_atoms
        self.retry_failed = retry_failed
        self.log_every = log_every
        self.reducer = reducer
        self._journal: j.Journal | None = None

    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Number of atoms of every structure of the task, of all workers."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What else the results depend on: the data, and settings of the subclass. JSON."""

    @abstractmethod
    def compute(self, todo: Sequence[int], predictor: Predictor) -> None:
        """Predict these structures; call `result` and `failure`."""

    def result(self, indices: Sequence[int], payload: bytes) -> None:
        """Keep a result of these structures."""
        self._journal.append(j.Kind.RESULT, indices, payload)
        self._progress.add(indices)

    def failure(self, index: int, name: str, error: str) -> None:
        """Keep the reason why this structure has no result, see `predictor.reason`."""
        logging.warning("%s: %s failed: %s", self.task, name, error)
        self._journal.append(j.Kind.FAILURE, [index], json.dumps({"name": name, "error": error}).encode())
        self._progress.add([index], failed=1)

    def run(self) -> None:
        """Compute what is left of this worker's share; merge where this was the last.

        Raises:
            JournalError: the folder belongs to another run, or its journal is in use.
            IncompleteError: this was the last worker, and structures failed.
        """
        end_on_signal()
        scheduler = self.job_config.scheduler
        ranks = scheduler.num_nodes * scheduler.ranks_per_node
        workers = ranks * scheduler.num_array_jobs
        worker = self.job_config.metadata.array_job_num * ranks + (distutils.get_rank() if ranks > 1 else 0)
        device = "cuda" if str(self.job_config.device_type).lower().endswith("cuda") else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("job.device_type: expected CPU on a machine without a GPU, got CUDA")

        predictor = Predictor(self.checkpoint, self.task_name, self.settings, device)
        sizes = self.sizes()
        fingerprint = {
            "format": FORMAT,
            "task": self.task,
            "checkpoint_sha256": sha256_of(predictor.path),
            "task_name": self.task_name,
            "inference": describe_settings(self.settings),
            "structures": len(sizes),
            **self.identity(),
        }
        about = environment(device, self.job_config.metadata.commit) | {
            "checkpoint": Path(self.checkpoint).name,
            "max_atoms": self.max_atoms,
            "worker": worker,
            "workers": workers,
        }
        folder = journal_folder(self.output_dir)
        own = folder / f"worker-{worker:04d}{j.SUFFIX}"
        with j.Journal(own, fingerprint, about) as self._journal:
            for path in j.journals(folder):
                header = j.read_header(path)
                if header is not None:
                    j.check_fingerprint(path, fingerprint, header["fingerprint"])
            done = j.done_indices(j.journals(folder), retry_failed=self.retry_failed)
            mine = range(worker, len(sizes), workers)
            todo = [i for i in mine if i not in done]
            left = f"{len(todo)} of its {len(mine)} structures left"
            print(f"{self.task}: worker {worker} of {workers} has {left}; journal {own}", flush=True)
            label = f"{self.task} worker {worker}/{workers}"
            self._progress = Progress(label, {i: sizes[i] for i in todo}, len(mine) - len(todo), self.log_every)
            if todo:
                self.compute(todo, predictor)
        if self.reducer is not None:
            self._merge_if_last(len(sizes))

    def _merge_if_last(self, structures: int) -> None:
        folder = journal_folder(self.output_dir)
        with j.locked(folder / "merge.lock") as lock:
            left = structures - j.mentioned(j.journals(folder))
            if left:
                print(f"{self.task}: {left} structures are still with other workers; the last one merges", flush=True)
                return
            lock.seek(0)
            launch = str(self.job_config.timestamp_id).encode()
            if lock.read() == launch:
                return  # two workers ended at the same moment, and the other one has merged
            self.reducer.job_config = self.job_config
            self.reducer.reduce()
            lock.truncate(0)
            lock.write(launch)

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """The journal is the state: it only has to reach the disk."""
        if self._journal is not None:
            self._journal.sync()
        return True

    def load_state(self, checkpoint_location: str | None) -> None:
        """Nothing to do: `run` reads the journals."""


@dataclass
class Collected:
    """What the journals of a finished run hold.

    Attributes:
        fingerprint: see `JournalledRunner.run`.
        workers: the `about` of each journal.
        results: for each structure the record that counts; the first where several runs computed it.
        failures: name and error of each structure that has no result, by index.
        repeated: number of structures that were computed more than once.
    """

    fingerprint: dict[str, Any]
    workers: list[dict[str, Any]]
    results: list[j.Record]
    failures: dict[int, dict[str, str]]
    repeated: int

    @property
    def missing(self) -> list[int]:
        """Indices that no journal mentions."""
        found = {i for record in self.results for i in record.indices.tolist()} | set(self.failures)
        return [i for i in range(self.fingerprint["structures"]) if i not in found]


def collect(output_dir: str | Path) -> Collected:
    """Read all journals of a run.

    Records that hold only structures seen before are left out; `Record.indices` of the others may still repeat some.

    Raises:
        FileNotFoundError: there are none.
        JournalError: they belong to different runs.
    """
    paths = j.journals(journal_folder(output_dir))
    headers = {path: header for path in paths if (header := j.read_header(path)) is not None}
    if not headers:
        raise FileNotFoundError(f"output_dir: expected journals in {journal_folder(output_dir)}, got none")
    fingerprint = next(iter(headers.values()))["fingerprint"]
    results: list[j.Record] = []
    failures: dict[int, dict[str, str]] = {}
    seen: set[int] = set()
    repeated = 0
    for path, header in headers.items():
        j.check_fingerprint(path, fingerprint, header["fingerprint"])
        for record in j.read_records(path):
            if record.kind == j.Kind.RESULT:
                new = set(record.indices.tolist()) - seen
                repeated += len(record.indices) - len(new)
                if new:
                    results.append(record)
                seen |= new
            elif record.kind == j.Kind.FAILURE:
                failures[int(record.indices[0])] = json.loads(record.payload)
    failures = {i: failure for i, failure in sorted(failures.items()) if i not in seen}
    return Collected(fingerprint, [h["about"] for h in headers.values()], results, failures, repeated)


def refuse_incomplete(output_dir: Path, collected: Collected, result: Path) -> None:
    """Write `failures.json` where structures failed, and raise where anything is missing.

    Raises:
        IncompleteError: tells the numbers, and what to do.
    """
    report = output_dir / "failures.json"
    report.unlink(missing_ok=True)
    missing, failures = collected.missing, collected.failures
    if not missing and not failures:
        return
    result.unlink(missing_ok=True)  # of an earlier run: it must not be taken for this one's
    if failures:
        write_json(report, [{"index": i, **failure} for i, failure in failures.items()])
    total = collected.fingerprint["structures"]
    raise IncompleteError(
        f"{output_dir}: expected results of {total} structures, got {total - len(missing) - len(failures)}: "
        f"{len(failures)} failed"
        + (f" (reasons in {report}; retry_failed=true computes them again)" if failures else "")
        + (f", {len(missing)} are not computed yet (run the same command again)" if missing else "")
    )
