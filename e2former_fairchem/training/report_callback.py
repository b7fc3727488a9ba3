"""Writes a report at the end of a training or an evaluation."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback
from torchtnt.framework.state import EntryPoint, State
from torchtnt.framework.unit import TEvalUnit, TTrainUnit

from e2former_fairchem.report.collect import ErrorCollector, gather, structure_name
from e2former_fairchem.report.errors import SetErrors
from e2former_fairchem.report.facts import gather_facts
from e2former_fairchem.report.folder import build, read_run, save_numbers


class Report(Callback):
    """A folder with errors and learning curves as figures, tables and one HTML page: `index.html`, `*.png`, and the
    numbers behind them (`errors.npz`, `summary.json`, `run.json`).

    Errors come from the last evaluation of the run. Only where training went on after it are the final (averaged)
    weights evaluated once more. Memory is bounded: sums, histograms and random samples of each validation set.

    Put it behind the callbacks that write checkpoints: whatever fails in here is said, and fails nothing else. The page
    can be made again from the numbers: `e2former-fairchem report FOLDER`.

    Args:
        folder: inside the run's folder, or absolute.
        seed: of the random samples in the parity plots.
    """

    def __init__(self, folder: str = "report", seed: int = 0) -> None:
        self.folder = folder
        self.seed = seed
        self._collector: ErrorCollector | None = None
        self._collected_at: int | None = None
        self._start = 0.0

    def on_eval_epoch_start(self, state: State, unit: TEvalUnit) -> None:
        """Listen to the predictions; those of an earlier evaluation are forgotten."""
        self._start = time.monotonic()
        self._collector = ErrorCollector(unit, state, self.seed)

    def on_eval_epoch_end(self, state: State, unit: TEvalUnit) -> None:
        """Stop listening."""
        self._collector.detach()
        if state.entry_point != EntryPoint.EVALUATE:
            self._collected_at = unit.train_progress.num_steps_completed

    def on_eval_end(self, state: State, unit: TEvalUnit) -> None:
        """Write the report of an evaluation."""
        if state.entry_point == EntryPoint.EVALUATE:
            self._write(state, unit, time.monotonic() - self._start)

    def on_train_end(self, state: State, unit: TTrainUnit) -> None:
        """Write the report of a training."""
        if self._collected_at != unit.train_progress.num_steps_completed and state.eval_state is not None:
            self._evaluate(state, unit)
        self._write(state, unit, None)

    def _evaluate(self, state: State, unit: TTrainUnit) -> None:
        if distutils.is_master():
            print("evaluating the final weights for the report", flush=True)
        unit.on_eval_epoch_start(state)
        self._collector = ErrorCollector(unit, state, self.seed)
        limit = state.eval_state.max_steps_per_epoch
        try:
            with torch.no_grad():
                for batch in itertools.islice(state.eval_state.dataloader, limit):
                    unit.eval_step(state, batch)
        except Exception as err:  # all ranks must reach the gathering
            self._collector.failure = err
        finally:
            self._collector.detach()

    def _write(self, state: State, unit: TEvalUnit, seconds: float | None) -> None:
        _guarded(lambda: self._numbers_and_page(state, unit, seconds))

    def _numbers_and_page(self, state: State, unit: TEvalUnit, seconds: float | None) -> None:
        if self._collector is None:
            return
        sets = gather(self._collector)  # of all ranks: before anything that only one of them does
        if sets is None:
            return
        folder = Path(unit.job_config.metadata.config_path).parent / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if seconds is None:
            seconds = max((record["seconds"] for record in read_run(folder)), default=None)
        facts = gather_facts(state, unit, seconds, sets)
        facts["structures"] = _names(state.eval_state.dataloader.dataset, sets)
        save_numbers(folder, sets, facts)
        try:
            page = build(folder)
        except ImportError as err:
            print(f"report: only numbers in {folder} ({err}); pip install matplotlib", flush=True)
        else:
            print(f"report: {page}", flush=True)
            return
        print(f"to make its page: e2former-fairchem report {folder}", flush=True)

    def on_exception(self, state: State, unit: TTrainUnit | TEvalUnit, exc: BaseException) -> None:
        """Leave the model as it was."""
        if self._collector is not None:
            self._collector.detach()


def _names(dataset: Any, sets: list[SetErrors]) -> dict[str, str]:
    """Names of the structures in the lists of the worst, by their place in the data."""
    worst = {int(i) for s in sets for numbers, _ in (s.worst_energy, s.worst_forces) for i in numbers[:, 0] if i >= 0}
    return {str(index): structure_name(dataset, index) for index in sorted(worst)}


def _guarded(write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as err:  # the run's results are on disk already: they stay good
        logging.exception("the report failed")
        print(f"report: NOT written, {type(err).__name__}: {err}", flush=True)
