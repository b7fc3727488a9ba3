"""Training runner that evaluates every few epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fairchem.core.components.callbacks import StopBeforeTimeoutCallback
from fairchem.core.components.train.train_runner import TrainEvalRunner
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_INFERENCE_CHECKPOINT
from torch.utils.data import DataLoader
from torchtnt.framework.fit import fit

from e2former_fairchem.compat import set_runner_callbacks, slurm_timeout_hours
from e2former_fairchem.training.arguments import integer
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import read_checkpoint, resume_without_record
from e2former_fairchem.training.resume import check_state
from e2former_fairchem.training.unit import TrainEvalUnit
from e2former_kernels.compat import end_workers


def evaluation_interval(every: int, max_epochs: int | None) -> int:
    """The largest number of epochs up to `every` that divides `max_epochs`, so that the last epoch is evaluated."""
    if max_epochs is None:
        return every
    return next(n for n in range(min(every, max_epochs), 0, -1) if max_epochs % n == 0)


class EpochTrainEvalRunner(TrainEvalRunner):
    """fairchem's `TrainEvalRunner`, which evaluates after every epoch, with the interval as an option.

    Args:
        evaluate_every_n_epochs: at most so many epochs between evaluations; the last epoch is always evaluated.
        cpu_threads: threads of one CPU operation during the run; None leaves torch's choice. A batch of a hundred
            atoms is too small to share: two threads gain little on two idle cores, and on busy ones they wait for
            each other (20 times slower, measured).
        kwargs: of `TrainEvalRunner`.

    Raises:
        ValueError: an interval or a number of threads below 1.
    """

    def __init__(self, *, evaluate_every_n_epochs: int = 1, cpu_threads: int | None = None, **kwargs: Any) -> None:
        integer("evaluate_every_n_epochs", evaluate_every_n_epochs, 1)
        counts = {"cpu_threads": cpu_threads} | {key: kwargs.get(key) for key in ("max_epochs", "max_steps")}
        for key, value in counts.items():
            if value is not None:
                integer(key, value, 1)
        super().__init__(**kwargs)
        self.cpu_threads = cpu_threads
        self.evaluate_every_n_epochs = evaluate_every_n_epochs

    def load_state(self, checkpoint_location: str | None) -> None:
        """As fairchem's, which opens the checkpoint only when training starts.

        Raises:
            FileNotFoundError: there is none at that place.
        """
        if checkpoint_location is not None:
            check_state(checkpoint_location)
        super().load_state(checkpoint_location)
        resume_without_record(self.train_eval_unit)
        written = Path(checkpoint_location or "", UNIT_INFERENCE_CHECKPOINT)
        if checkpoint_location is not None and isinstance(self.train_eval_unit, TrainEvalUnit) and written.is_file():
            card = read_card(read_checkpoint(written, key="job.runner_state_path", any_backbone=True))
            self.train_eval_unit.states_seen |= {tuple(state) for state in card.get("states", ())}
            self.train_eval_unit.trained_before = card.get("trained_before", [])

    def run(self) -> None:
        """Train and evaluate."""
        threads = torch.get_num_threads()
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        try:
            self._fit()
        finally:
            torch.set_num_threads(threads)
            for loader in (self.train_dataloader, self.eval_dataloader):
                if isinstance(loader, DataLoader):
                    end_workers(loader)

    def _fit(self) -> None:
        set_runner_callbacks(self)
        callbacks = list(self.callbacks)
        if self.stop_before_timeout_min is not None:
            callbacks.append(
                StopBeforeTimeoutCallback(
                    timeout_hr=slurm_timeout_hours(self), stop_before_timeout_min=self.stop_before_timeout_min
                )
            )
        fit(
            self.train_eval_unit,
            train_dataloader=self.train_dataloader,
            eval_dataloader=self.eval_dataloader,
            max_epochs=self.max_epochs,
            max_steps=self.max_steps,
            max_eval_steps_per_epoch=self.max_eval_steps_per_epoch,
            evaluate_every_n_steps=self.evaluate_every_n_steps,
            evaluate_every_n_epochs=evaluation_interval(self.evaluate_every_n_epochs, self.max_epochs),
            callbacks=callbacks,
        )
