"""Callbacks of fairchem's training and evaluation loops: readable progress, results, and the exported checkpoint."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.components.callbacks import TrainCheckpointCallback
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_INFERENCE_CHECKPOINT, UNIT_RESUME_CONFIG
from torchtnt.framework.callback import Callback
from torchtnt.framework.state import State
from torchtnt.framework.unit import TEvalUnit, TTrainUnit

from e2former_fairchem.files import replacing, write_text
from e2former_fairchem.training.arguments import integer
from e2former_fairchem.training.card import validation_errors, versions, write_card
from e2former_fairchem.training.properties import PROPERTIES
from e2former_fairchem.training.recorders import LossRecorder, ZeroForceRecorder
from e2former_fairchem.training.resume import make_movable
from e2former_fairchem.training.signals import StopRequest, end_on_signal, status
from e2former_fairchem.training.unit import TrainEvalUnit


def keep_old(*paths: Path) -> None:
    """Where files of these names are there, move them to names with a number, the same for all, and say so."""
    there = [path for path in paths if path.exists()]
    if not there:
        return
    number = next(n for n in itertools.count(1) if not any(_numbered(path, n).exists() for path in paths))
    for path in there:
        path.rename(_numbered(path, number))
    print(f"kept of an earlier run: {', '.join(str(_numbered(path, number)) for path in there)}", flush=True)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def left_out(dataloader: Any) -> int:
    """Number of structures that fairchem's sampler by atoms has dropped because they are larger than a batch."""
    batches = getattr(getattr(dataloader, "batch_sampler", None), "all_batches", None)
    return 0 if batches is None else len(dataloader.dataset) - sum(map(len, batches))


def _say_left_out(what: str, dataloader: Any) -> None:
    if number := left_out(dataloader):
        print(f"{what}: {number} structures are left out, with more atoms than max_atoms", flush=True)


def collect_metrics(unit: TEvalUnit) -> dict[str, dict[str, float]]:
    """Metrics of the evaluation that just ended, over all ranks: dataset -> `task,metric` -> value."""
    eval_unit = getattr(unit, "eval_unit", unit)
    device = distutils.get_device_for_local_rank()
    result: dict[str, dict[str, float]] = {}
    for task, by_dataset in eval_unit.running_metrics.items():
        for dataset, metrics in by_dataset.items():
            for name, metric in metrics.items():
                total = distutils.all_reduce(metric.total, average=False, device=device)
                numel = distutils.all_reduce(metric.numel, average=False, device=device)
                result.setdefault(dataset, {})[f"{task},{name}"] = float(total) / max(float(numel), 1.0)
    return result


def gather(own: Any) -> list[Any]:
    """The same thing of every rank."""
    size = distutils.get_world_size()
    if size == 1:
        return [own]
    found = [None] * size
    dist.all_gather_object(found, own)
    return found


def format_metrics(metrics: dict[str, float], properties: dict[str, str], zero_force: float | None) -> str:
    """Metrics of one data set in words, e.g. `E 23.4 meV/atom, F 0.142 eV/Å (14.1 % of zero forces)`."""
    words = []
    for name, value in metrics.items():
        task, metric = name.rsplit(",", 1)
        prop = properties.get(task, "")
        known = PROPERTIES.get(prop)
        if known is None or known.line is None or known.metric != metric:
            continue
        word = known.line.format(known.digits.format(value * known.line_factor))
        if prop == "forces" and zero_force:
            word += f" ({100 * value / zero_force:.1f} % of zero forces)"
        words.append(word)
    return ", ".join(words)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress(Callback):
    """One line per epoch: losses, time spent and left, and after an evaluation the errors on every validation set.

    Args:
        zero_force_baseline: also give force errors as a share of the zero-force baseline.
        quiet: silence fairchem's INFO lines while training runs; warnings stay.
    """

    def __init__(self, zero_force_baseline: bool = False, quiet: bool = False) -> None:
        self.with_baseline = zero_force_baseline
        self.quiet = quiet
        self._losses: LossRecorder | None = None
        self._zero: ZeroForceRecorder | None = None
        self._level = logging.INFO

    def _say(self, line: str) -> None:
        if distutils.is_master():
            print(line, flush=True)

    def on_train_start(self, state: State, unit: TTrainUnit) -> None:
        """Attach to the losses; say what is about to be trained."""
        self._properties = {task.name: task.property for task in unit.tasks}
        self._losses = LossRecorder(unit)
        self._start = time.monotonic()
        self._first_epoch = unit.train_progress.num_epochs_completed
        dataset = state.train_state.dataloader.dataset
        parameters = sum(p.numel() for p in unit.model.parameters() if p.requires_grad)
        self._say(
            f"training {parameters:,} parameters on {len(dataset)} structures, "
            f"{len(state.train_state.dataloader)} steps an epoch, on {distutils.get_device_for_local_rank()}"
        )
        if distutils.is_master():
            _say_left_out("training", state.train_state.dataloader)
            if state.eval_state is not None:
                _say_left_out("validation", state.eval_state.dataloader)
        if self.quiet:
            self._level = logging.getLogger().level
            logging.getLogger().setLevel(logging.WARNING)

    def on_train_epoch_start(self, state: State, unit: TTrainUnit) -> None:
        """Forget the last epoch's losses."""
        self._losses.reset()

    def on_train_step_start(self, state: State, unit: TTrainUnit) -> None:
        """Count; also true after a resume within an epoch."""
        self._losses.start_step()

    def on_train_step_end(self, state: State, unit: TTrainUnit) -> None:
        """Losses of an evaluation are not the training's."""
        self._losses.end_step()

    def on_train_epoch_end(self, state: State, unit: TTrainUnit) -> None:
        """The epoch's line."""
        done = unit.train_progress.num_epochs_completed
        means = self._losses.means()
        parts = " + ".join(f"{self._properties[task]} {value:.4f}" for task, value in means.items())
        spent = time.monotonic() - self._start
        last = state.train_state.max_epochs
        if last is None and state.train_state.max_steps is not None:
            last = -(-state.train_state.max_steps // max(len(state.train_state.dataloader), 1))
        clock = _minutes(spent)
        if last is not None:
            clock += f", {_minutes(spent / max(done - self._first_epoch, 1) * max(last - done, 0))} left"
        self._say(f"epoch {done:>3}/{last or '?'}  loss {sum(means.values()):.4f} = {parts}  [{clock}]")

    def on_eval_epoch_start(self, state: State, unit: TEvalUnit) -> None:
        """Watch the forces that pass, for the baseline."""
        if self.with_baseline:
            self._zero = ZeroForceRecorder(unit)

    def on_eval_epoch_end(self, state: State, unit: TEvalUnit) -> None:
        """Errors on every validation set."""
        metrics = collect_metrics(unit)
        baseline = {}
        if self._zero is not None:
            self._zero.detach()
            baseline = self._zero.means(state.eval_state.dataloader.dataset.dataset_names)
        for name, values in metrics.items():
            self._say(f"    {name}: {format_metrics(values, self._properties, baseline.get(name))}")

    def _finish(self) -> None:
        for recorder in (self._losses, self._zero):
            if recorder is not None:
                recorder.detach()
        if self.quiet:
            logging.getLogger().setLevel(self._level)

    def on_train_end(self, state: State, unit: TTrainUnit) -> None:
        """Say how long it took."""
        self._finish()
        steps = unit.train_progress.num_steps_completed
        self._say(f"trained {steps} steps in {_minutes(time.monotonic() - self._start)} min")

    def on_exception(self, state: State, unit: TTrainUnit | TEvalUnit, exc: BaseException) -> None:
        """Leave logging and losses as they were."""
        self._finish()


class Checkpoints(TrainCheckpointCallback):
    """fairchem's checkpoints, without the one of step 0, and with the last inference checkpoint under a fixed name.

    A checkpoint's folder is there complete or not at all, and it can be moved: its `resume.yaml` finds it. The
    inference checkpoint in it has a card (`e2former_fairchem.training.card`).

    SIGINT (Ctrl-C) and SIGTERM stop a local run after the step at hand (in an evaluation: after the batch at hand) with
    a checkpoint, a line that tells how to resume, and status 130 or 143. An evaluation that was cut short is not
    repeated. Where torch's launcher has started several ranks, its own status is 1, and it kills them after 30 s
    (`TORCH_ELASTIC_SHUTDOWN_TIMEOUT`). Under SLURM the signals stay with submitit.

    Args:
        checkpoint_every_n_steps: steps between checkpoints; the last one is always written. None writes none, unless a
            signal asks for one.
        max_saved_checkpoints: how many to keep besides the last.
        export_to: file that gets a copy of the last inference checkpoint, complete or not at all; None copies nothing.
            An older file of that name is kept under another.
    """

    def __init__(
        self, checkpoint_every_n_steps: int | None, max_saved_checkpoints: int = 1, export_to: str | None = None
    ) -> None:
        if checkpoint_every_n_steps is not None:
            checkpoint_every_n_steps = integer("checkpoint_every_n_steps", checkpoint_every_n_steps, 1)
        super().__init__(checkpoint_every_n_steps, integer("max_saved_checkpoints", max_saved_checkpoints, 0))
        self.export_to = export_to
        self._card: Callable[[], dict[str, Any]] = dict
        self._errors: dict[str, dict[str, float]] = {}
        self._stop = StopRequest()
        self._between_steps = True
        self._same_number_of_batches = False

    def set_runner_callbacks(
        self, save_callback: Callable[[str], None], load_callback: Callable[[str | None], None], checkpoint_dir: str
    ) -> None:
        """Take fairchem's functions, and the place of its signal handlers."""
        super().set_runner_callbacks(partial(self._save, save_callback), load_callback, checkpoint_dir)
        self._stop.install()

    def _save(self, save: Callable[[str], None], location: str) -> None:
        """Write a checkpoint beside the folder of all checkpoints, then move it in: what is there is whole."""
        target = Path(location)
        unfinished = target.parents[1] / f".{target.name}.unfinished"
        self._stop.busy = True
        try:
            if distutils.is_master():
                shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            distutils.synchronize()
            save(str(unfinished))
            card = self._card()
            if distutils.is_master():
                if (written := unfinished / UNIT_INFERENCE_CHECKPOINT).is_file():
                    write_card(written, card)
                make_movable(unfinished / UNIT_RESUME_CONFIG, target)
                target.parent.mkdir(parents=True, exist_ok=True)
                old = target.parents[1] / f".{target.name}.old"
                if target.exists():
                    target.rename(old)
                unfinished.rename(target)
                shutil.rmtree(old, ignore_errors=True)
                logging.info("the checkpoint is complete, and now %s", target)
            distutils.synchronize()
        except BaseException:
            if distutils.is_master():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._stop.busy = False

    def on_train_start(self, state: State, unit: TTrainUnit) -> None:
        """Know what the card needs."""
        super().on_train_start(state, unit)
        self._card = partial(self._describe, unit, len(state.train_state.dataloader.dataset), versions())

    def _describe(self, unit: TTrainUnit, structures: int, with_versions: dict[str, str]) -> dict[str, Any]:
        """The card as it is now; all ranks take part."""
        card = {"structures": structures, "steps": unit.train_progress.num_steps_completed}
        if isinstance(unit, TrainEvalUnit):
            card |= unit.card
            card |= {"trained_before": unit.trained_before} if unit.trained_before else {}
            card["states"] = [list(state) for state in sorted(set().union(*gather(unit.states_seen)))]
        return card | {"validation": self._errors, "versions": with_versions}

    def on_eval_epoch_end(self, state: State, unit: TEvalUnit) -> None:
        """Errors for the card."""
        properties = {task.name: task.property for task in unit.tasks}
        self._errors = validation_errors(collect_metrics(unit), properties)

    def on_train_step_start(self, state: State, unit: TTrainUnit) -> None:
        """Save when it is time; untrained weights are not worth it."""
        if unit.train_progress.num_steps_completed > 0:
            super().on_train_step_start(state, unit)
        self._between_steps = False

    def on_train_step_end(self, state: State, unit: TTrainUnit) -> None:
        """Stop before the next batch is asked for: workers that read may have got the signal, too."""
        self._between_steps = True
        self._stop_if_asked(state, unit)

    def on_train_epoch_end(self, state: State, unit: TTrainUnit) -> None:
        """Stop behind an epoch's last step."""
        self._stop_if_asked(state, unit)

    def on_eval_start(self, state: State, unit: TEvalUnit) -> None:
        """Find out whether the ranks can be asked after every batch."""
        self._same_number_of_batches = self._stop.same(len(state.eval_state.dataloader))

    def on_eval_step_end(self, state: State, unit: TEvalUnit) -> None:
        """Stop in an evaluation."""
        if self._same_number_of_batches:
            self._stop_if_asked(state, unit)

    def on_exception(self, state: State, unit: TTrainUnit | TEvalUnit, exc: BaseException) -> None:
        """Save what there is where a signal was the end of the workers that read."""
        if self._between_steps and distutils.get_world_size() == 1:
            self._stop_if_asked(state, unit)
        self._stop.remove()

    def _stop_if_asked(self, state: State, unit: TTrainUnit) -> None:
        if not self._stop.installed:
            return
        progress = unit.train_progress
        # After an epoch's last step fairchem's sampler could not go on: the epoch is counted first.
        if progress.num_steps_completed_in_epoch >= len(state.train_state.dataloader):
            return
        received = self._stop.agreed()
        if received is None:
            return
        save, folder = self.save_callback, self.checkpoint_dir
        location = Path(folder) / f"step_{progress.num_steps_completed}"
        save(str(location))
        self._leave(received, f"after step {progress.num_steps_completed}", location)

    def _leave(self, received: signal.Signals, when: str, location: Path) -> None:
        if distutils.is_master():
            resume = location / UNIT_RESUME_CONFIG
            print(
                f"stopped by {received.name} {when}; to resume this run: fairchem -c {quote(str(resume))}", flush=True
            )
        distutils.synchronize()  # torch's launcher ends the others when one rank has ended
        self._stop.remove()
        distutils.cleanup()
        raise SystemExit(status(received))

    def on_train_end(self, state: State, unit: TTrainUnit) -> None:
        """Save the last checkpoint, export it, and say where both are."""
        super().on_train_end(state, unit)
        final = Path(self.checkpoint_dir) / "final"
        if distutils.is_master() and self.checkpoint_every_n_steps is not None:
            written = final / UNIT_INFERENCE_CHECKPOINT
            if self.export_to is not None and written.is_file():
                target = Path(self.export_to).absolute()
                keep_old(target)
                with replacing(target) as handle:
                    shutil.copyfile(written, handle.name)
                written = target
            print(f"inference checkpoint: {written}", flush=True)
            print(f"to resume this run: fairchem -c {quote(str(final / UNIT_RESUME_CONFIG))}", flush=True)
        received = self._stop.agreed()
        if received is not None:
            self._leave(received, "after the last step", final)
        self._stop.remove()


class EvaluationReport(Callback):
    """Errors of an evaluation run in words, and as JSON in a file.

    Args:
        output: JSON file; None writes none.
        zero_force_baseline: also give force errors as a share of the zero-force baseline.
    """

    def __init__(self, output: str | None = None, zero_force_baseline: bool = False) -> None:
        self.output = output
        self.with_baseline = zero_force_baseline
        self._zero: ZeroForceRecorder | None = None

    def on_eval_start(self, state: State, unit: TEvalUnit) -> None:
        """A signal ends an evaluation at once: there is nothing to resume."""
        end_on_signal()

    def on_eval_epoch_start(self, state: State, unit: TEvalUnit) -> None:
        """Watch the forces that pass, for the baseline."""
        if self.with_baseline:
            self._zero = ZeroForceRecorder(unit)

    def on_eval_epoch_end(self, state: State, unit: TEvalUnit) -> None:
        """Say the errors and write the file."""
        metrics = collect_metrics(unit)
        properties = {task.name: task.property for task in unit.tasks}
        dataset = state.eval_state.dataloader.dataset
        baseline = {}
        if self._zero is not None:
            self._zero.detach()
            baseline = self._zero.means(dataset.dataset_names)
        if not distutils.is_master():
            return
        sizes = {name: len(part) for name, part in zip(dataset.dataset_names, dataset.datasets, strict=True)}
        for name, values in metrics.items():
            words = format_metrics(values, properties, baseline.get(name))
            print(f"{name}, {sizes[name]} structures: {words}", flush=True)
        _say_left_out("evaluation", state.eval_state.dataloader)
        if self.output is not None:
            report = {"metrics": metrics, "num_structures": sizes, "zero_force_mae": baseline}
            report["left_out"] = left_out(state.eval_state.dataloader)
            path = Path(self.output).absolute()
            keep_old(path)
            write_text(path, json.dumps(report, indent=1) + "\n")
            print(f"results: {path}", flush=True)
