"""`fairchem -c configs/md.yaml`: molecular dynamics with any checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.md.velocitydistribution import Stationary
from fairchem.core.common import distutils
from fairchem.core.components.runner import Runner
from omegaconf import DictConfig

from e2former_fairchem.files import replacing, sha256_of, write_json
from e2former_fairchem.leaderboard.predictor import Predictor, check_model, describe_settings, inference_settings
from e2former_fairchem.leaderboard.provenance import environment
from e2former_fairchem.md.engine import Engine, draw_velocities
from e2former_fairchem.md.record import LOG, TRAJECTORY, Record, claim, read_log, read_restart
from e2former_fairchem.md.run import Intervals, run, summarize
from e2former_fairchem.md.settings import ENSEMBLES, Settings
from e2former_fairchem.pes.systems import load_systems
from e2former_fairchem.training.arguments import boolean, integer, number, positive
from e2former_fairchem.training.callbacks import keep_old
from e2former_fairchem.training.checkpoint import read_checkpoint
from e2former_fairchem.training.signals import StopRequest, status

ENGINES = ("auto", "ase", "nvalchemi")
_FOLDER = "job.run_dir"


class MDRunner(Runner):
    """Integrates one structure and writes `md.jsonl`, `trajectory.extxyz`, `md.json` and `md.png` into a folder.

    A run that ended early, also by `kill -9`, goes on where the same command is given again: no step is lost or done
    twice. So does a finished one with a larger `steps`.

    Args:
        structure: file that ASE reads, with one structure, or `FILE@INDEX`; charge and spin come from its info, and
            velocities where it has some.
        checkpoint: path of an inference checkpoint, or the name of a model that fairchem downloads.
        output_dir: folder of the run.
        steps: of the integrator, in all.
        ensemble, temperature, timestep, pressure, thermostat_time, barostat_time, seed: see
            `e2former_fairchem.md.settings.Settings`.
        engine: `ase`, `nvalchemi`, or `auto`: nvalchemi on a GPU where it is installed, else ASE.
        skin: Å; our backbone searches neighbours again when an atom has moved half of it. 0 searches at every step.
        task_name: data set of the checkpoint whose energies and forces are used.
        inference: preset of fairchem's inference settings, or changes of the preset `batch`.
        log_every: steps between two lines of `md.jsonl`.
        save_every: steps between two frames of the trajectory.
        restart_every: steps between two restart files.
        plot: draw the figure.
        cpu_threads: threads of one CPU operation; None leaves torch's choice.

    Raises:
        ValueError, FileNotFoundError: a wrong value, before a model is loaded.
    """

    def __init__(
        self,
        structure: str | None,
        checkpoint: str | None,
        output_dir: str,
        steps: int = 1000,
        ensemble: str = "nve",
        temperature: float = 300.0,
        timestep: float = 0.5,
        pressure: float = 1.0,
        thermostat_time: float = 100.0,
        barostat_time: float = 1000.0,
        seed: int = 0,
        engine: str = "auto",
        skin: float = 0.5,
        task_name: str = "omol",
        inference: str | dict[str, Any] | DictConfig = "default",
        log_every: int = 10,
        save_every: int = 100,
        restart_every: int = 1000,
        plot: bool = True,
        cpu_threads: int | None = None,
    ) -> None:
        for key, value, known in (("ensemble", ensemble, ENSEMBLES), ("engine", engine, ENGINES)):
            if value not in known:
                raise ValueError(f"{key}: expected one of {', '.join(known)}, got {value!r}")
        self.settings = Settings(
            ensemble=ensemble,
            temperature=number("temperature", temperature),
            timestep=positive("timestep", timestep),
            pressure=number("pressure", pressure),
            thermostat_time=positive("thermostat_time", thermostat_time),
            barostat_time=positive("barostat_time", barostat_time),
            seed=integer("seed", seed, 0),
        )
        if ensemble != "nve":
            positive("temperature", temperature)
        self.steps = integer("steps", steps, 1)
        self.intervals = Intervals(
            integer("log_every", log_every, 1),
            integer("save_every", save_every, 1),
            integer("restart_every", restart_every, 1),
        )
        self.plot = boolean("plot", plot)
        self.cpu_threads = None if cpu_threads is None else integer("cpu_threads", cpu_threads, 1)
        self.inference = inference_settings(inference, one_composition=True)
        self.structure = structure
        self.atoms = _read_structure(structure)
        if ensemble == "npt" and not self.atoms.pbc.all():
            raise ValueError(f"ensemble: expected nve or nvt for a structure with pbc {self.atoms.pbc}, got npt")
        self.checkpoint = check_model(checkpoint)
        self.output_dir = Path(output_dir).absolute()
        if engine == "nvalchemi" and not _nvalchemi():
            raise ModuleNotFoundError(
                'engine: expected nvalchemi to be installed (pip install "e2former-fairchem[md]"), or engine=ase'
            )
        self.engine = engine
        self.skin = number("skin", skin)
        self.task_name = task_name

    def run(self) -> None:
        """Integrate on the first rank.

        Raises:
            BlockingIOError: another run writes into the folder.
            BlownUp: an atom left; the files have all until then.
            SystemExit: a signal came; the same command goes on.
            ValueError: the folder holds another run, or the checkpoint does not serve.
        """
        if not distutils.is_master():
            return
        stop = StopRequest()
        stop.install()
        device = "cuda" if str(self.job_config.device_type).lower().endswith("cuda") else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("job.device_type: expected CPU on a machine without a GPU, got CUDA")
        threads = torch.get_num_threads()
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        try:
            with claim(self.output_dir):
                reason = self._integrate(device, stop)
        finally:
            torch.set_num_threads(threads)
        if reason is not None:
            print(f"{reason.name}: stopped; the same command goes on from here", flush=True)
            raise SystemExit(status(reason))

    def _integrate(self, device: str, stop: StopRequest) -> Any:
        if Path(self.checkpoint).is_file():
            read_checkpoint(self.checkpoint, any_backbone=True)
        settings = self.inference
        if device == "cpu" and settings.compile:
            logging.info("md: on a CPU nothing is compiled, which takes a minute and gains little")
            settings = dataclasses.replace(settings, compile=False)
        predictor = Predictor(self.checkpoint, self.task_name, settings, device)
        if self.settings.ensemble == "npt" and "stress" not in predictor.calculator.implemented_properties:
            raise ValueError(
                f"ensemble: expected nve or nvt for a checkpoint without stress, got npt and {self.checkpoint}"
            )
        backbone = predictor.unit.model.module.backbone
        if hasattr(backbone, "keep_neighbors"):
            backbone.keep_neighbors(self.skin)
        if self.engine == "auto":
            self.engine = "nvalchemi" if device == "cuda" and _nvalchemi() else "ase"
        facts = {
            "structure": _fingerprint(self.atoms),
            "checkpoint": sha256_of(predictor.path),
            "task_name": self.task_name,
            "engine": self.engine,
            **dataclasses.asdict(self.settings),
        }
        found = read_restart(self.output_dir, facts, _FOLDER)
        if found is None:
            keep_old(*(self.output_dir / name for name in (LOG, TRAJECTORY, "md.json", "md.png")))
        elif found[0] > self.steps:
            raise ValueError(f"steps: expected at least {found[0]}, which {self.output_dir} has, got {self.steps}")
        engine = self._start(predictor)
        if found is not None:
            engine.restore(*found)
            print(f"goes on at step {engine.steps} of the run in {self.output_dir}", flush=True)
        record = Record(self.output_dir, facts)
        try:
            reason = run(
                engine,
                record,
                self.steps,
                self.settings.timestep,
                self.intervals,
                stop.agreed,
                lambda line: print(line, flush=True),
            )
            if reason is None:
                self._report(record, predictor, device)
        finally:
            record.close()
        return reason

    def _start(self, predictor: Predictor) -> Engine:
        atoms = self.atoms.copy()
        if atoms.has("momenta"):
            Stationary(atoms, preserve_temperature=False)
        else:
            draw_velocities(atoms, self.settings.temperature, self.settings.seed)
        if self.engine == "nvalchemi":
            from e2former_fairchem.md.nvalchemi_engine import NvalchemiEngine

            return NvalchemiEngine(atoms, predictor, self.settings)
        from e2former_fairchem.md.ase_engine import ASEEngine

        return ASEEngine(atoms, predictor.calculator, self.settings)

    def _report(self, record: Record, predictor: Predictor, device: str) -> None:
        summary = summarize(record, len(self.atoms), self.settings.ensemble)
        name = Path(self.checkpoint).name
        content = {
            "structure": {
                "file": self.structure,
                "formula": self.atoms.get_chemical_formula(),
                "atoms": len(self.atoms),
            },
            "checkpoint": {"name": name, "sha256": record.facts["checkpoint"], "task_name": self.task_name},
            "engine": self.engine,
            "settings": dataclasses.asdict(self.settings),
            "inference": describe_settings(predictor.unit.inference_settings),
            "environment": environment(device),
            "results": summary,
        }
        write_json(self.output_dir / "md.json", content)
        written = [LOG, TRAJECTORY, "md.json"]
        if self.plot:
            from e2former_fairchem.md.plot import draw
            from e2former_fairchem.pes.plot import save

            thermostat = None if self.settings.ensemble == "nve" else self.settings.temperature
            title = f"{self.settings.ensemble.upper()} of {self.atoms.get_chemical_formula()}"
            subtitle = f"{name}, {self.settings.timestep:g} fs, {self.engine}, {device}"
            figure = draw(read_log(self.output_dir), len(self.atoms), thermostat, title, subtitle)
            with replacing(self.output_dir / "md.png") as handle:
                save(figure, handle)
            written.append("md.png")
        drift = summary.get("drift_meV_per_atom_per_ps")
        print(
            f"mean temperature {summary['mean_temperature_K']:.1f} K"
            + ("" if drift is None else f", drift of the total energy {drift:+.3g} meV/atom/ps"),
            f"results: {', '.join(str(self.output_dir / file) for file in written)}",
            sep="\n",
            flush=True,
        )

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Nothing to keep: a run has its restart file."""
        return True

    def load_state(self, checkpoint_location: str | None) -> None:
        """Nothing to load."""


def _nvalchemi() -> bool:
    return importlib.util.find_spec("nvalchemi") is not None


def _read_structure(structure: str | None) -> Atoms:
    if structure is None:
        raise ValueError(
            "structure: expected a file that ASE reads, got nothing; add structure=FILE to the command line"
        )
    found = load_systems([str(structure)], "structure", constraints=True)
    if len(found) != 1:
        raise ValueError(
            f"structure: expected one structure, got {len(found)} in {structure}; name one of them: {structure}@0"
        )
    atoms = found[0][1]
    if atoms.constraints:
        names = ", ".join(type(one).__name__ for one in atoms.constraints)
        raise ValueError(f"structure: expected no constraints, which are not integrated, got {names} in {structure}")
    if not (atoms.get_masses() > 0).all():
        raise ValueError(f"structure: expected atoms with masses, got {atoms.get_masses().min()} in {structure}")
    return atoms


def _fingerprint(atoms: Atoms) -> str:
    """What the trajectory depends on of a structure, hexadecimal."""
    parts = [atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc, atoms.get_masses(), atoms.get_momenta()]
    charge = [atoms.info["charge"], atoms.info["spin"]]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in [*parts, charge])).hexdigest()
