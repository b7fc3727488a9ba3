"""The seven evaluation tasks: from the journals to the gzipped JSON for the upload, and scores where labels are."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from e2former_fairchem.files import read_json, write_gzipped_json, write_json
from e2former_fairchem.leaderboard.evaluate import EvaluationRunner
from e2former_fairchem.leaderboard.provenance import write_provenance
from e2former_fairchem.leaderboard.recipes import OMolReducer, evaluator
from e2former_fairchem.leaderboard.runner import collect, refuse_incomplete
from e2former_fairchem.leaderboard.tasks import KeyPath, assemble, get_task, read_results


class EvaluationReducer(OMolReducer):
    """fairchem's reducer, reading our journals: shards may share top-level keys, and nothing may be missing.

    Writes `<task>_results.json.gz` with its provenance, `warnings.json` (relaxations that an exception ended, so that
    their last valid step counts) and, with labels, `scores.json`.

    Args:
        task: one of `tasks.TASKS`.
        output_dir: the runner's.
        labels: results of DFT in the same layout, JSON or gzipped JSON; None: no scores.

    Raises:
        ValueError: no such task, or labels that are no results.
        FileNotFoundError: no such labels.
    """

    def __init__(self, task: str, output_dir: str, labels: str | None = None) -> None:
        metric = getattr(evaluator, get_task(task).evaluator)
        if labels is not None and not Path(labels).is_file():
            raise FileNotFoundError(f"labels: expected a JSON file with results of DFT, got {labels}, which is no file")
        super().__init__(benchmark_name=task, evaluator=metric, benchmark_labels=labels)
        self._labelled = {} if labels is None else read_results(labels, "labels")
        self.output_dir = Path(output_dir).absolute()
        self.target = self.output_dir / f"{task}_results.json.gz"

    @property
    def runner_type(self) -> type[EvaluationRunner]:
        """The runner whose journals are read."""
        return EvaluationRunner

    def check_labels(self, paths: Collection[KeyPath]) -> None:
        """Check that the labels are those of these structures, all of them or some.

        Raises:
            ValueError: tells both numbers, and one of each.
        """
        foreign = [path for path in self._labelled if path not in paths]
        if foreign:
            raise ValueError(
                f"labels: expected calculations among the {len(paths)} of the input, like "
                f"{'/'.join(next(iter(paths)))}, got {len(self._labelled)} in {self.benchmark_labels}, of which "
                f"{len(foreign)} are others, like {'/'.join(foreign[0])}"
            )

    def join_results(self, results_dir: str, glob_pattern: str) -> dict[str, Any]:
        """All results, nested as the leaderboard wants them, in the input's order.

        Raises:
            IncompleteError: structures are missing; what is there stays in the journals.
        """
        self._collected = collect(self.output_dir)
        refuse_incomplete(self.output_dir, self._collected, self.target)
        records = sorted(self._collected.results, key=lambda record: int(record.indices[0]))
        contents = [json.loads(record.payload) for record in records]
        self.check_labels({tuple(content["path"]) for content in contents})
        self._warnings = [
            {"name": "/".join(c["path"]), "error": c["error"], "steps": c.get("steps")}
            for c in contents
            if "error" in c
        ]
        self._relaxations = [c["converged"] for c in contents if "converged" in c]
        return assemble((tuple(c["path"]), c["result"]) for c in contents)

    def save_results(self, results: dict[str, Any], results_dir: str) -> None:
        """Write the file for the upload, its provenance and the warnings."""
        write_gzipped_json(self.target, results)
        facts = {
            "relaxations": len(self._relaxations),
            "relaxations_not_converged": len(self._relaxations) - sum(self._relaxations),
            "relaxations_ended_by_an_exception": len(self._warnings),
            "computed_more_than_once": self._collected.repeated,
        }
        write_provenance(self.target, self._collected.fingerprint, self._collected.workers, **facts)
        report = self.output_dir / "warnings.json"
        report.unlink(missing_ok=True)
        if self._warnings:
            write_json(report, self._warnings)
            logging.warning(
                "%d relaxations were ended by an exception; their last valid step counts, the reasons are in %s",
                len(self._warnings),
                report,
            )
        print(f"submission: {self.target} ({', '.join(f'{k} {v}' for k, v in facts.items())})", flush=True)

    def compute_metrics(self, results: dict[str, Any], run_name: str) -> pd.DataFrame | None:
        """The leaderboard's metrics against the labels, by fairchem-data-omol's own function."""
        if self.benchmark_labels is None:
            return None
        # As the evaluator will see them after the upload: keys are strings, numbers have been through JSON.
        metrics = self.evaluator(read_json(self.benchmark_labels), read_json(self.target))
        return pd.DataFrame([metrics], index=[run_name])

    def save_metrics(self, metrics: pd.DataFrame, results_dir: str) -> None:
        """Write and print the metrics."""
        found = {name: float(value) for name, value in metrics.iloc[0].items()}
        write_json(self.output_dir / "scores.json", found)
        numbers = ", ".join(f"{k} {v:.6g}" for k, v in found.items())
        print(f"{self.benchmark_name}, labels of {len(self._labelled)} calculations: {numbers}", flush=True)

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Nothing to save: merging starts again."""
        return True
