"""Checkpoints with one soon after the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtnt.framework.state import State
from torchtnt.framework.unit import TTrainUnit

from e2former_fairchem.training.arguments import integer
from e2former_fairchem.training.callbacks import Checkpoints


class EarlyCheckpoints(Checkpoints):
    """`Checkpoints`, with one more after `first` steps: that a run can be saved and used is seen within seconds."""

    def __init__(self, first: int, **options: Any) -> None:
        super().__init__(**options)
        self.first = integer("first", first, 1)

    def on_train_step_start(self, state: State, unit: TTrainUnit) -> None:
        """Save the first one; the next regular one takes its place."""
        step = unit.train_progress.num_steps_completed
        every = self.checkpoint_every_n_steps
        if step == self.first and (every is None or step % every):
            self.save_callback(str(Path(self.checkpoint_dir) / f"step_{step}"))
        super().on_train_step_start(state, unit)
