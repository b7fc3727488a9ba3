"""Training runner that evaluates every few epochs."""

from __future__ import annotations

from typing import Any

from fairchem.core.components.callbacks import StopBeforeTimeoutCallback
from fairchem.core.components.train.train_runner import TrainEvalRunner
from torchtnt.framework.fit import fit


def evaluation_interval(every: int, max_epochs: int | None) -> int:
    """The largest number of epochs up to `every` that divides `max_epochs`, so that the last epoch is evaluated."""
    if max_epochs is None:
        return every
    return next(n for n in range(min(every, max_epochs), 0, -1) if max_epochs % n == 0)


class EpochTrainEvalRunner(TrainEvalRunner):
    """fairchem's `TrainEvalRunner`, which evaluates after every epoch, with the interval as an option.

    Args:
        evaluate_every_n_epochs: at most so many epochs between evaluations; the last epoch is always evaluated.
        kwargs: of `TrainEvalRunner`.

    Raises:
        ValueError: an interval below 1.
    """

    def __init__(self, *, evaluate_every_n_epochs: int = 1, **kwargs: Any) -> None:
        if evaluate_every_n_epochs < 1:
            raise ValueError(f"evaluate_every_n_epochs: expected at least 1, got {evaluate_every_n_epochs}")
        super().__init__(**kwargs)
        self.evaluate_every_n_epochs = evaluate_every_n_epochs

    def run(self) -> None:
        """Train and evaluate."""
        self._set_runner_callbacks(self.callbacks)
        callbacks = list(self.callbacks)
        if self.stop_before_timeout_min is not None:
            callbacks.append(
                StopBeforeTimeoutCallback(
                    timeout_hr=self._get_slurm_timeout_hr(), stop_before_timeout_min=self.stop_before_timeout_min
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
