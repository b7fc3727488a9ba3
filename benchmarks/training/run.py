"""Speed of training as fairchem's trainer runs it: `fairchem -c configs/quickstart.yaml`, eager beside replayed.

Beside it fairchem's eSCN-MD and AllScAIP with 64 channels and 3 layers, from configs/baselines.

    python benchmarks/training/run.py
    python benchmarks/training/run.py small large --steps 40 --name quick

Every case trains in this process, through fairchem's command line, on files of the quickstart's format that are
written first: displaced molecules of ASE's g2 set, or clusters of 21 waters, with made-up labels. Timed are whole steps
(loader, losses, clipping, optimiser, average, metrics) in windows at whose ends the GPU is waited for; the first steps,
which compile and capture, are not counted. GPU time is the sum of its kernels, from torch's profiler, over other steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
WINDOW = 10
PROFILED = 5

# The authors' function but for the smooth norm, which the rows of the tables have had from the start.
FUNCTION = (
    "backbone.message_order=1", "backbone.attention_norm=smooth", "backbone.reflection_equivariant=false",
    "backbone.power_spectrum=false",
)  # fmt: skip
OURS = ("backbone.sphere_channels=64", "backbone.num_layers=3", "backbone.num_heads=32", "backbone.cutoff=5.0")
SMALL = (*OURS, *FUNCTION)
LARGE = (
    "backbone.sphere_channels=128", "backbone.num_layers=4", "backbone.num_heads=32", "backbone.cutoff=5.0", *FUNCTION,
)  # fmt: skip
PAPER = ("backbone=e2former_v2_omol25_conserving",)
ESCN = (
    "backbone.sphere_channels=64", "backbone.hidden_channels=64", "backbone.edge_channels=64", "backbone.num_layers=3",
)  # fmt: skip
ALLSCAIP = ("backbone.hidden_size=64", "backbone.num_layers=3")  # a head of 64 channels, as fairchem's own
#: Overrides, kind of structures, structures in a batch, run file.
CASES = {
    "small": (SMALL, "molecules", 11, "quickstart.yaml"),
    "large": (SMALL, "molecules", 115, "quickstart.yaml"),
    "ours_large": (OURS, "molecules", 115, "quickstart.yaml"),  # as the config has it
    "wide": (LARGE, "molecules", 115, "quickstart.yaml"),
    "paper": (PAPER, "waters", 24, "quickstart.yaml"),
    "paper_6144": (PAPER, "waters", 97, "quickstart.yaml"),
    "escn_small": (ESCN, "molecules", 11, "baselines/escn_md_quickstart.yaml"),
    "escn_large": (ESCN, "molecules", 115, "baselines/escn_md_quickstart.yaml"),
    "allscaip_small": (ALLSCAIP, "molecules", 11, "baselines/allscaip_quickstart.yaml"),
    "allscaip_large": (ALLSCAIP, "molecules", 115, "baselines/allscaip_quickstart.yaml"),
}


def structures(kind: str, number: int, seed: int = 0) -> list[Atoms]:
    """Displaced molecules of 12 to 14 atoms, or clusters of 63, with labels that are made up."""
    rng = np.random.default_rng(seed)
    names = ("C6H6", "isobutane", "trans-butane")
    frames = []
    for i in range(number):
        if kind == "molecules":
            atoms = molecule(names[i % len(names)])
        else:
            sites = 2.9 * np.array(list(itertools.product(range(3), repeat=3)))[:21]
            atoms = Atoms()
            for site in sites:
                water = molecule("H2O")
                water.rotate(rng.uniform(0, 360), rng.normal(size=3))
                water.translate(site)
                atoms += water
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        forces = rng.normal(0, 0.5, atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=float(rng.normal(0, 0.5)), forces=forces - forces.mean(0))
        atoms.info = {"charge": 0, "spin": 1, "source": f"{kind}/{i}", "data_id": "made_up", "num_atoms": len(atoms)}
        frames.append(atoms)
    return frames


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepTimes(Callback):
    """Times of the steps after ``warmup``, of ``steps`` in windows, then a profile; the results go to ``file``."""

    def __init__(self, warmup: int, steps: int, file: str) -> None:
        self.warmup, self.steps, self.file = warmup, steps, Path(file)
        self.count = 0
        self.windows: list[float] = []
        self.profile = None

    def on_train_step_end(self, state, unit) -> None:
        """Count; begin and end what is measured; of several ranks the first writes."""
        self.count += 1
        done = self.count - self.warmup
        if done < 0:
            return
        if done == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if done % WINDOW == 0 and done <= self.steps:
            _wait()
            now = time.perf_counter()
            if done:
                self.windows.append((now - self.start) / WINDOW)
            self.start = now
        if done == self.steps:
            kind = torch.profiler.ProfilerActivity
            self.profile = torch.profiler.profile(activities=[kind.CUDA if torch.cuda.is_available() else kind.CPU])
            self.profile.start()
        if done == self.steps + PROFILED:
            _wait()
            self.profile.stop()
            if distutils.is_master():
                self._write(unit)

    def _write(self, unit) -> None:
        kernels = [event for event in self.profile.events() if event.device_type.name == "CUDA"]
        replays = getattr(unit, "_replays", None)
        record = {
            "step_ms": 1e3 * statistics.median(self.windows),
            "windows_ms": [round(1e3 * window, 3) for window in self.windows],
            "gpu_ms": sum(event.device_time_total for event in kernels) / 1e3 / PROFILED,
            "kernels": len(kernels) // PROFILED,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0,
            "sizes": 0 if replays is None else len(replays._graphs),
            "loss": float(unit.last_loss),
        }
        self.file.write_text(json.dumps(record))


def train(case: str, replay: str, data: Path, options: argparse.Namespace) -> dict:
    """One training through fairchem's command line."""
    from fairchem.core import _cli

    overrides, kind, batch, config = CASES[case]
    total = options.warmup + options.steps + PROFILED + 1
    file = data / f"{case}_{replay}.json"
    repeats = float(batch * options.ranks * total // options.structures + 1)  # one epoch is long enough
    callback = f"{{_target_: run.StepTimes, warmup: {options.warmup}, steps: {options.steps}, file: {file}}}"
    metrics = "{_target_: e2former_fairchem.training.metrics.Metrics, every_n_steps: 50, tensorboard: false}"
    line = [
        *overrides, "dataset=folders", f"data_train={data / kind}", f"data_val={data / 'val'}", f"batch_size={batch}",
        "element_references=spice", "dataset.max_energy_residual=null",
        f"dataset.train.combined_dataset_config.sampling.ratios={{omol.train: {repeats}}}",
        f"num_workers={options.workers}", f"+runner.train_eval_unit.tf32={str(options.tf32).lower()}",
        *(() if config.startswith("baselines/") else (f"runner.train_eval_unit.replay={replay}",)),
        f"runner.max_steps={total}", "runner.max_epochs=null", "runner.cpu_threads=null",
        f"runner.callbacks=[{callback},{metrics}]", "~checkpoint_every", f"job.run_dir={data / 'runs'}",
        f"job.run_name={case}_{replay}", f"job.scheduler.ranks_per_node={options.ranks}",
    ]  # fmt: skip
    try:
        _cli.main(argparse.Namespace(config=str(ROOT / "configs" / config)), line)
    finally:
        if distutils.initialized():
            distutils.cleanup()
    record = json.loads(file.read_text())
    steps, atoms = 1e3 / record["step_ms"], batch * options.ranks * options.atoms[kind]
    return {"steps_per_second": steps, "atoms_per_second": atoms * steps} | record


def main() -> None:
    """Run the cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[], help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--structures", type=int, default=400)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--replay", nargs="+", choices=("off", "auto"), default=["off", "auto"])
    parser.add_argument("--ranks", type=int, default=1, help="data parallel, a GPU each; batches are a rank's")
    parser.add_argument("--strict", dest="tf32", action="store_false", help="float32 products instead of TF32")
    parser.add_argument("--name", default="training")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    from e2former_fairchem.data.make_sample import write_folder

    records = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "tf32": options.tf32, "ranks": options.ranks, "steps": options.steps, "warmup": options.warmup, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        options.atoms = {}  # of a structure, on average
        for kind in ("molecules", "waters"):
            frames = structures(kind, options.structures)
            options.atoms[kind] = statistics.mean(map(len, frames))
            write_folder(frames, data / kind)
        write_folder(structures("molecules", 8, seed=1), data / "val")
        for case in options.cases or CASES:
            for replay in ("off",) if CASES[case][3].startswith("baselines/") else options.replay:
                record = train(case, replay, data, options)
                records["cases"].setdefault(case, {})[replay] = record
                shown = {key: round(value, 2) for key, value in record.items() if isinstance(value, int | float)}
                print(case, replay, shown, flush=True)
                options.results.mkdir(parents=True, exist_ok=True)
                (options.results / f"{options.name}.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # fairchem finds the callback as run.StepTimes
    main()
