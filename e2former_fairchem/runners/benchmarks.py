"""fairchem's two benchmarks, speed of inference and speed and precision of training, with what they leave to the user.

`InferenceBenchRunner` and `TrainingBenchmarkRunner` measure, and write their reports. Here the inputs are checked
first, the device is the job's, and a table is printed at the end.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from fairchem.core.components.benchmark import InferenceBenchRunner
from fairchem.core.components.benchmark.training import TrainingBenchmarkRunner
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from e2former_fairchem.leaderboard.predictor import check_model, inference_settings
from e2former_fairchem.training.signals import end_on_signal

NS_PER_DAY = 24 * 3600 / 1e6  # of one step a second at a time step of 1 fs


def _device(job_config: Any) -> str:
    """`cuda` or `cpu`, from `job.device_type`."""
    device = "cuda" if str(job_config.device_type).lower().endswith("cuda") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("job.device_type: expected CPU on a machine without a GPU, got CUDA")
    return device


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig | DictConfig) else value


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: expected a positive integer, got {value!r}")
    return value


class SpeedBenchmark(InferenceBenchRunner):
    """Time of energy, forces and stress over atoms: face-centred carbon with vacancies, at most 54 edges an atom.

    fairchem's protocol: 10 warm-up calls, then `repeats` times `timeiters` calls on the same structure, each with a
    barrier, which on NCCL waits for the GPU. Charge 0, spin not given. Building the graph is part of a call.

    Args:
        checkpoint: path of an inference checkpoint.
        natoms: sizes.
        task_name: data set of the checkpoint whose tasks are predicted.
        inference: preset of fairchem's inference settings, or changes of the preset `batch`.
        timeiters, repeats: see above.
        seed: of the vacancies.

    Raises:
        ValueError, FileNotFoundError: a wrong value, before anything heavy starts.
    """

    def __init__(
        self,
        checkpoint: str | None,
        natoms: Sequence[int],
        task_name: str = "omol",
        inference: Any = "batch",
        timeiters: int = 10,
        repeats: int = 5,
        seed: int = 1,
    ) -> None:
        sizes = _plain(natoms)
        if not isinstance(sizes, list | tuple) or not sizes:
            raise ValueError(f"natoms: expected a list of positive integers, got {sizes!r}")
        path = check_model(checkpoint)
        if not Path(path).is_file():
            raise ValueError(f"checkpoint: expected a file, which is all that fairchem's benchmark takes, got {path}")
        super().__init__(
            model_checkpoints={Path(path).name: path},
            natoms_list=[_count("natoms", n) for n in sizes],
            timeiters=_count("timeiters", timeiters),
            repeats=_count("repeats", repeats),
            seed=seed,
            inference_settings=inference_settings(inference),
            dataset_name=task_name,
        )

    def run(self) -> None:
        """Measure, and print a table."""
        end_on_signal()
        self.device = _device(self.job_config)
        super().run()
        if not distutils.is_master():
            return
        file = Path(self.run_dir).absolute() / "benchmark_results.json"
        print(f"{'atoms':>9} {'ms a call':>11} {'atoms/s':>11} {'ns/day at 1 fs':>15}")
        for measured in json.loads(file.read_text())["model_to_qps_data"].values():
            for atoms, speed in measured:
                if speed == "OOM":
                    print(f"{atoms:>9,} {'out of memory':>11}")
                    continue
                calls = speed / NS_PER_DAY  # a second
                print(f"{atoms:>9,} {1000 / calls:>11.2f} {atoms * calls:>11.4g} {speed:>15.3g}")
        print(f"results: {file}", flush=True)


def as_overrides(changes: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Hydra's overrides for a mapping of keys, nested or dotted: `{backbone: {lmax: 1}}` -> `backbone.lmax=1`."""
    found: list[str] = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            found += as_overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value) if not isinstance(value, str) else value}")
    return found


def compose_to_file(config: Path, overrides: Sequence[str], folder: Path) -> str:
    """A YAML file without groups that stands for a config with overrides; fairchem's benchmark takes a file alone."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.parent), version_base="1.3"):
        composed = compose(config.stem, list(overrides))
    file = folder / config.name
    OmegaConf.save(composed, file)
    return str(file)


class TrainingBenchmark(TrainingBenchmarkRunner):
    """Training in single precision against a candidate: loss and gradient of the first step, steps a second, memory.

    fairchem's benchmark makes fake data of production-like sizes and trains the same configuration twice from one seed:
    as it is with bf16 off, and with bf16 (if asked for) and the candidate's overrides. It keeps the first run's result
    in the system's temporary folder and takes it for any later run with the same file name, number of steps, device and
    seed, whatever the file says by then; here that folder is the run's own, so that both runs are always measured.

    Args:
        training_config: YAML of the training run, such as configs/benchmarks/training_run.yaml.
        bf16: of the candidate.
        steps: of each run.
        seed: of both.
        overrides: of both runs, e.g. `{backbone: e2former_v2_small}`.
        candidate: keys of the candidate, e.g. `{backbone: {convolution: eaas}}`.

    Raises:
        ValueError, FileNotFoundError: a wrong value, before anything heavy starts.
    """

    def __init__(
        self,
        training_config: str,
        bf16: bool = True,
        steps: int = 20,
        seed: int = 42,
        overrides: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> None:
        path = Path(training_config).absolute()
        if not path.is_file():
            raise FileNotFoundError(
                f"training_config: expected a YAML file, got {path}, which does not exist; start in the repository's "
                f"folder, or add training_config=FILE to the command line"
            )
        if _count("steps", steps) < 2:
            raise ValueError("steps: expected at least 2, of which the first is a warm-up, got 1")
        self.source = path
        self.overrides = as_overrides(_plain(overrides) or {})
        super().__init__(
            str(path),
            bf16=bool(bf16),
            throughput_steps=steps,
            seed=seed,
            candidate_overrides=as_overrides(_plain(candidate) or {}),
        )

    def run(self) -> dict[str, Any]:
        """Train twice, and print a table."""
        end_on_signal()
        self.device = _device(self.job_config)
        folder = Path(self.job_config.metadata.results_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        before = tempfile.tempdir
        with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work:
            inner = [*self.overrides, f"job.run_dir={folder / 'runs'}"]
            self.training_config = compose_to_file(self.source, inner, Path(work))
            tempfile.tempdir = work
            try:
                report = super().run()
            finally:
                tempfile.tempdir = before
        print(f"{'':<24} {'float32':>12} {'candidate':>12}")
        for name, of_baseline, of_candidate in (
            ("steps a second", "baseline_steps_per_second", "steps_per_second"),
            ("peak memory, MiB", "baseline_peak_memory_mb", "peak_memory_mb"),
            ("loss of the first step", "baseline_loss", "candidate_loss"),
            ("gradient's norm", "baseline_grad_norm", "candidate_grad_norm"),
            ("loss of the last step", "baseline_final_loss", "candidate_final_loss"),
        ):
            print(f"{name:<24} {report[of_baseline]:>12.5g} {report[of_candidate]:>12.5g}")
        print(f"results: {folder / 'training_benchmark_report.json'}", flush=True)
        return report
