"""Metrics of a training run as JSON lines and TensorBoard events in the run's folder. No account is needed.

Weights & Biases stays fairchem's own option: give `job.logger` as configs/job/local.yaml tells.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback
from torchtnt.framework.state import State
from torchtnt.framework.unit import TEvalUnit, TTrainUnit

from e2former_fairchem.files import write_text
from e2former_fairchem.training.arguments import integer
from e2former_fairchem.training.callbacks import collect_metrics
from e2former_fairchem.training.recorders import LossRecorder, ZeroForceRecorder

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file, in order; a last line that a killed run left incomplete is ignored.

    Raises:
        ValueError: a line before the last is no JSON.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as err:
            if number < len(lines):
                raise ValueError(f"{path}: expected JSON in line {number}, got {line[:80]!r}") from err
    return records


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: they become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    """torch's writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        print(f"no TensorBoard files ({err}); pip install tensorboard", flush=True)
        return None
    # Events from this step on in older files, of a run that was resumed from before them, are not shown.
    return SummaryWriter(str(folder), purge_step=first_step)


class Metrics(Callback):
    """Losses, learning rate, gradient norm and speed every few steps, and the errors of every evaluation.

    `metrics.jsonl` gets one JSON object a line. Both kinds have `step` (steps completed), `epoch` (a fraction) and
    `seconds` (since the start, over all resumed parts, evaluations included):

    * `"kind": "train"`: means since the last such line (`steps` of them): `loss`, `losses` by task (as weighted in the
      total, averaged over ranks), `grad_norm` (before clipping), the last `lr`; and of all ranks, without the time of
      evaluations, `structures_per_second` and `atoms_per_second`.
    * `"kind": "evaluation"`: `metrics` (data set -> `task,metric` -> value, in eV and Å) and `zero_force_mae` (mean
      absolute force component of each set, eV/Å).

    TensorBoard gets the same numbers in the folder `tensorboard`. Rank 0 writes line by line, so that a killed run
    keeps its curve. A resumed run goes on in the same files: lines beyond the checkpoint's step are removed, and
    TensorBoard hides them. No step is lost if `every_n_steps` divides the steps between checkpoints; otherwise the
    first means after a resume are over fewer steps.

    Args:
        every_n_steps: steps between lines.
        tensorboard: write TensorBoard events; where it is not installed, this is said once and left out.

    Raises:
        ValueError: an interval below 1.
    """

    def __init__(self, every_n_steps: int = 10, tensorboard: bool = True) -> None:
        self.every = integer("every_n_steps", every_n_steps, 1)
        self.with_tensorboard = tensorboard
        self._tensorboard: Any = None
        self._losses: LossRecorder | None = None
        self._zero: ZeroForceRecorder | None = None
        self._path: Path | None = None

    def on_train_start(self, state: State, unit: TTrainUnit) -> None:
        """Open the files, and take up those of a run that is resumed."""
        self._losses = LossRecorder(unit)
        self._grad_norm: Any = 0.0
        self._epoch_steps = max(len(state.train_state.dataloader), 1)
        step = unit.train_progress.num_steps_completed
        before = 0.0
        if distutils.is_master():
            folder = Path(unit.job_config.metadata.checkpoint_dir).parent
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / METRICS_FILE
            before = self._take_up(step)
            if self.with_tensorboard:
                self._tensorboard = _open_tensorboard(folder / "tensorboard", step + 1)
        self._start = time.monotonic() - before
        self._window_start = time.monotonic()

    def _take_up(self, step: int) -> float:
        """Remove what lies beyond `step` from the file; returns the seconds of training up to there."""
        if not self._path.is_file():
            return 0.0
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        return max((record["seconds"] for record in kept), default=0.0)

    def on_train_step_start(self, state: State, unit: TTrainUnit) -> None:
        """Note the learning rate: fairchem's unit advances it at the end of the step."""
        self._losses.start_step()
        self._lr = unit.optimizer.param_groups[0]["lr"]

    def on_train_step_end(self, state: State, unit: TTrainUnit) -> None:
        """Add the step up; write when it is time."""
        self._losses.end_step()
        if unit.last_grad_norm is not None:
            self._grad_norm = self._grad_norm + unit.last_grad_norm
        if unit.train_progress.num_steps_completed % self.every == 0:
            self._write_window(unit)

    def _write_window(self, unit: TTrainUnit) -> None:
        losses = self._losses
        if losses.steps == 0:
            return
        device = distutils.get_device_for_local_rank()
        tasks = list(losses.losses)
        values = [*losses.losses.values(), self._grad_norm, losses.structures, losses.atoms]
        # one collective and one wait for the device
        row = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).reshape(()) for v in values])
        *sums, grad_norm, structures, atoms = distutils.all_reduce(row, device=device).tolist()
        now = time.monotonic()
        spent = max(now - self._window_start, 1e-9)
        count = losses.steps * distutils.get_world_size()
        # workers that share graphs count them once
        alone = getattr(unit, "dp_world_size", distutils.get_world_size()) / distutils.get_world_size()
        by_task = {task: total / count for task, total in zip(tasks, sums, strict=True)}
        record = {
            "steps": losses.steps,
            "loss": sum(by_task.values()),
            "losses": by_task,
            "lr": self._lr,
            "structures_per_second": alone * structures / spent,
            "atoms_per_second": alone * atoms / spent,
        }
        if unit.last_grad_norm is not None:
            record["grad_norm"] = grad_norm / count
        losses.reset()
        self._grad_norm = 0.0
        self._window_start = now
        self._write("train", unit, record)

    def _write(self, kind: str, unit: TTrainUnit, record: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        progress = unit.train_progress
        step = progress.num_steps_completed
        place = {
            "kind": kind,
            "step": step,
            "epoch": progress.num_epochs_completed + progress.num_steps_completed_in_epoch / self._epoch_steps,
            "seconds": round(time.monotonic() - self._start, 3),
        }
        with self._path.open("a") as handle:
            handle.write(json.dumps(_finite(place | dict(record))) + "\n")
        if self._tensorboard is None:
            return
        scalars = _flatten(record if kind == "train" else record["metrics"])
        prefix = "train" if kind == "train" else "val"
        for name, value in scalars.items():
            self._tensorboard.add_scalar(f"{prefix}/{name}", float(value), step)
        self._tensorboard.add_scalar(f"{prefix}/epoch", place["epoch"], step)
        self._tensorboard.flush()

    def on_eval_epoch_start(self, state: State, unit: TEvalUnit) -> None:
        """Watch the forces that pass, for the zero-force baseline."""
        self._eval_start = time.monotonic()
        self._zero = ZeroForceRecorder(unit)

    def on_eval_epoch_end(self, state: State, unit: TEvalUnit) -> None:
        """Write the errors on every validation set."""
        self._zero.detach()
        record = {
            "metrics": collect_metrics(unit),
            "zero_force_mae": self._zero.means(state.eval_state.dataloader.dataset.dataset_names),
        }
        self._write("evaluation", unit, record)
        self._window_start += time.monotonic() - self._eval_start  # is not the training's time

    def _finish(self) -> None:
        if self._losses is not None:
            self._losses.detach()
        if self._zero is not None:
            self._zero.detach()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def on_train_end(self, state: State, unit: TTrainUnit) -> None:
        """Write the last steps and close the files."""
        self._write_window(unit)
        self._finish()

    def on_exception(self, state: State, unit: TTrainUnit | TEvalUnit, exc: BaseException) -> None:
        """Close the files; what was written stays."""
        self._finish()


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested dictionaries as TensorBoard names them: `losses/omol_forces`."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{key.replace(',', '/')}"
        flat |= _flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return flat
