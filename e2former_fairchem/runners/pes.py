"""`fairchem -c configs/evaluate/pes.yaml`: the checks of `e2former_fairchem.pes` on one checkpoint."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.components.runner import Runner
from omegaconf import DictConfig, ListConfig, OmegaConf

from e2former_fairchem.files import replacing, sha256_of, write_json, write_text
from e2former_fairchem.leaderboard.predictor import check_model, describe_settings, inference_settings
from e2former_fairchem.leaderboard.provenance import environment
from e2former_fairchem.pes.potential import PRECISIONS, Potential
from e2former_fairchem.pes.run import CHECKS, Outcomes, run_checks, select_checks, summarize
from e2former_fairchem.pes.table import notes, render, rows, totals
from e2former_fairchem.training.callbacks import keep_old
from e2former_fairchem.training.signals import end_on_signal

RAISE_ON = ("error", "fail", "never")


class ChecksFailed(RuntimeError):
    """A check raised, or missed its limit where that was asked for; the reports are written."""


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


class PESRunner(Runner):
    """Runs the checks, writes `pes.json`, `pes.md` and `pes.png` into a folder, and prints the table.

    Args:
        checkpoint: path of an inference checkpoint, or the name of a model that fairchem downloads.
        output_dir: folder of the reports.
        checks: names out of `pes.run.CHECKS`.
        settings: for each check its settings, see the settings classes.
        structures: file or files whose structures replace the test systems of every check; charge and spin come from
            their info.
        task_name: data set of the checkpoint whose energies and forces are checked.
        inference: preset of fairchem's inference settings, or changes of the preset `batch`.
        precision: `float64`, `float32`, or `auto`: float64, and float32 where the model cannot.
        max_atoms: atoms of a batch.
        seed: of velocities, displacements and rotations.
        plot: draw the figure; needs matplotlib.
        cpu_threads: threads of one CPU operation; None leaves torch's choice. Small molecules are too little work to
            share, and threads on a busy machine wait for each other.
        raise_on: end with an error if a check raised (`error`), also if one missed its limit (`fail`), or `never`.

    Raises:
        ValueError, FileNotFoundError: a wrong value, before a model is loaded.
        ModuleNotFoundError: matplotlib is missing.
    """

    def __init__(
        self,
        checkpoint: str | None,
        output_dir: str,
        checks: Sequence[str] = tuple(CHECKS),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        structures: str | Sequence[str] | None = None,
        task_name: str = "omol",
        inference: str | dict[str, Any] | DictConfig = "batch",
        precision: str = "auto",
        max_atoms: int = 2048,
        seed: int = 0,
        plot: bool = True,
        cpu_threads: int | None = 1,
        raise_on: str = "error",
    ) -> None:
        for key, value, known in (("precision", precision, PRECISIONS), ("raise_on", raise_on, RAISE_ON)):
            if value not in known:
                raise ValueError(f"{key}: expected one of {', '.join(known)}, got {value!r}")
        for key, value in (("max_atoms", max_atoms), ("cpu_threads", 1 if cpu_threads is None else cpu_threads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}: expected a positive integer, got {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: expected an integer that is not negative, got {seed!r}")
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "plot: expected matplotlib to be installed (pip install matplotlib), or plot=false"
            )
        checks, structures = _plain(checks), _plain(structures)
        self.selected = select_checks(
            [checks] if isinstance(checks, str) else checks,
            _plain(settings) or {},
            [structures] if isinstance(structures, str) else structures,
        )
        self.settings = inference_settings(inference)
        self.checkpoint = check_model(checkpoint)
        self.output_dir = Path(output_dir).absolute()
        self.inference = inference
        self.task_name = task_name
        self.precision = precision
        self.max_atoms = max_atoms
        self.seed = seed
        self.plot = plot
        self.cpu_threads = cpu_threads
        self.raise_on = raise_on

    def run(self) -> None:
        """Run all checks on the first rank.

        Raises:
            ChecksFailed: see `raise_on`.
        """
        end_on_signal()
        if not distutils.is_master():
            return
        device = "cuda" if str(self.job_config.device_type).lower().endswith("cuda") else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("job.device_type: expected CPU on a machine without a GPU, got CUDA")
        start = time.monotonic()
        threads = torch.get_num_threads()
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        try:
            potential = Potential.load(
                self.checkpoint, self.task_name, self.inference, self.precision, device, self.max_atoms
            )
            outcomes = run_checks(potential, self.selected, self.seed, lambda line: print(line, flush=True))
        finally:
            torch.set_num_threads(threads)
        self._report(potential, outcomes, device, time.monotonic() - start)

    def _report(self, potential: Potential, outcomes: Outcomes, device: str, seconds: float) -> None:
        about = potential.describe()
        remarks = ([about["note"]] if about["note"] else []) + notes(outcomes)
        verdict = totals(outcomes)
        name = Path(self.checkpoint).name
        subtitle = (
            f"{about['backbone'].rsplit('.', 1)[-1]}, {about['parameters']:,} parameters, cutoff "
            f"{about['cutoff']} Å, {about['precision']}, task {self.task_name}, {device}, {seconds:.0f} s"
        )
        text = [f"# Potential-energy surface of {name}", "", subtitle, "", render(rows(outcomes)), ""]
        tail = [*(f"- {remark}" for remark in remarks), *([""] if remarks else []), verdict]
        content = {
            "checkpoint": {"name": name, "sha256": sha256_of(potential.predictor.path), **about},
            "task_name": self.task_name,
            "inference": describe_settings(potential.predictor.unit.inference_settings),
            "seed": self.seed,
            "environment": environment(device),
            "seconds": round(seconds, 1),
            "verdicts": summarize(outcomes),
            "settings": {one.check: dataclasses.asdict(one.settings) for one in self.selected},
            "checks": {c: {s: o.as_json() for s, o in found.items()} for c, found in outcomes.items()},
        }
        keep_old(*(self.output_dir / name for name in ("pes.json", "pes.md", "pes.png")))
        write_json(self.output_dir / "pes.json", content)
        write_text(self.output_dir / "pes.md", "\n".join([*text, *tail, ""]))
        written = ["pes.json", "pes.md"]
        if self.plot:
            from e2former_fairchem.pes.plot import draw, save

            with replacing(self.output_dir / "pes.png") as handle:
                save(draw(outcomes, f"Potential-energy surface of {name}", subtitle), handle)
            written.append("pes.png")
        print("\n".join(["", render(rows(outcomes, brief=True)), "", *tail, ""]), flush=True)
        print(f"results: {', '.join(str(self.output_dir / file) for file in written)}", flush=True)
        wrong = {"error": ("error",), "fail": ("error", "fail"), "never": ()}[self.raise_on]
        bad = [f"{check} ({verdict})" for check, verdict in summarize(outcomes).items() if verdict in wrong]
        if bad:
            raise ChecksFailed(f"pes: {', '.join(bad)}; see {self.output_dir / 'pes.md'}")

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Nothing to keep: a run takes a minute, and starts again."""
        return True

    def load_state(self, checkpoint_location: str | None) -> None:
        """Nothing to load."""
