"""The quickstart's tables of errors: both networks trained from several seeds, their surface checks, mean and range.

Each run is fairchem's own command line in a process of its own, on one core, as many side by side as asked for:
training, then `configs/evaluate/pes.yaml` on its checkpoint, then the errors molecule by molecule. A seed sets initial
weights (`job.seed`) and batches (the sampler's). A finished run is one JSON file; runs that have theirs are left out,
so that a call that was stopped goes on where it was, and more seeds add up.

    python benchmarks/quickstart/run.py --seeds 0 1 2 3 4 --at-once 10        trains, checks, makes the tables
    python benchmarks/quickstart/run.py --tables                              the tables alone, into README and docs
    python benchmarks/quickstart/run.py --output /tmp/q --seeds 0 epochs=2    a trial; overrides are of both trainings

Tables come into README and docs where the results are this folder's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAIRCHEM = (sys.executable, "-c", "from fairchem.core._cli import main; main()")
CHECKS = ("nve", "bond_scan", "forces", "extensivity", "reflection", "cutoff")
SETS = {"omol.val_known": "known molecules", "omol.val_new": "new molecules"}


@dataclass(frozen=True)
class NetworkConfig:
    """A column of the table."""

    title: str
    config: str


NETWORKS = {
    "e2former_v2": NetworkConfig("E2Former-V2", "configs/quickstart.yaml"),
    "escn_md": NetworkConfig("fairchem's eSCN-MD", "configs/baselines/escn_md_quickstart.yaml"),
}


class RunFailed(RuntimeError):
    """A command of a run ended with an error."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("--device", default="CPU", type=str.upper, choices=("CPU", "CUDA"))
    parser.add_argument("--output", type=Path, default=HERE, help="results go to OUTPUT/results (default: here)")
    parser.add_argument("--runs", type=Path, help="folder of checkpoints and logs (default: OUTPUT/runs)")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--tables", action="store_true", help="only make the tables of the results that are there")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of both trainings")
    found = parser.parse_args(argv)
    if found.at_once < 1:
        parser.error(f"--at-once: expected at least 1, got {found.at_once}")
    if wrong := [text for text in found.overrides if "=" not in text]:
        parser.error(f"overrides: expected KEY=VALUE, got {wrong}")
    return found


def machine(device: str, commit: str | None) -> dict[str, Any]:
    """Where a run was made."""
    from importlib.metadata import version

    git = subprocess.run(["git", "rev-parse", "-q", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "fairchem-core")},
        "commit": commit or git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "CUDA":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def run_command(command: Sequence[str], log: Path, core: int | None) -> dict[str, float]:
    """Run a command to its end; returns its wall and processor seconds.

    Raises:
        RunFailed: with the end of its output.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    start = time.monotonic()
    with log.open("w") as handle:
        handle.write(f"{' '.join(command)}\n")
        handle.flush()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=handle, stderr=subprocess.STDOUT)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})  # before it has threads, which inherit it
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunFailed(f"{log}: ended with status {process.returncode}\n{tail}")
    return {
        "wall_seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def last_evaluation(folder: Path) -> dict[str, Any]:
    """Metrics after the last epoch, from the run's `metrics.jsonl`."""
    (file,) = folder.glob("*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if record["kind"] == "evaluation"][-1]


def measure(name: str, seed: int, folder: Path, options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    """What one run gives: training, surface checks, errors by molecule."""
    shutil.rmtree(folder, ignore_errors=True)  # what a call that was stopped has left
    folder.mkdir(parents=True)
    train, checks = folder / "train", folder / "checks"
    where = f"job.device_type={options.device}"
    seeds = [f"job.seed={seed}", f"train_dataloader.batch_sampler_fn.seed={seed}"]
    command = [*FAIRCHEM, "-c", NETWORKS[name].config, f"job.run_dir={train}", where, *seeds, *options.overrides]
    training = run_command(command, folder / "train.log", core)
    checkpoint = train / "inference_ckpt.pt"
    command = [*FAIRCHEM, "-c", "configs/evaluate/pes.yaml", f"checkpoint={checkpoint}", f"job.run_dir={checks}"]
    checking = run_command([*command, where, "plot=false", "raise_on=never"], folder / "checks.log", core)
    molecules = folder / "molecules.json"
    command = [sys.executable, str(HERE / "molecules.py"), str(checkpoint), str(molecules), options.device.lower()]
    run_command(command, folder / "molecules.log", core)
    evaluation, surface = last_evaluation(train), json.loads((checks / "pes.json").read_text())
    return {
        "network": name,
        "config": NETWORKS[name].config,
        "seed": seed,
        "overrides": sorted(options.overrides),
        "device": options.device,
        "side_by_side": options.at_once,
        "parameters": surface["checkpoint"]["parameters"],
        "epochs": evaluation["epoch"],
        "steps": evaluation["step"],
        "metrics": {key: metrics_of(evaluation, key) for key in SETS},
        "training": training,
        "checking": checking,
        "checks": surface["verdicts"],
        "figures": figures_of(surface["checks"]),
        "molecules": json.loads(molecules.read_text()),
    }


def metrics_of(evaluation: Mapping[str, Any], key: str) -> dict[str, float]:
    """Errors on one set: meV/atom, eV/Å and the share of the mean absolute force component."""
    found, zero = evaluation["metrics"][key], evaluation["zero_force_mae"][key]
    return {
        "energy_mev_per_atom": 1000 * found["omol_energy,per_atom_mae"],
        "force_mae": found["omol_forces,mae"],
        "share_of_zero_forces": found["omol_forces,mae"] / zero,
    }


def figures_of(checks: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What the surface checks measured, without their curves: check -> system -> quantity."""
    keys = ("value", "threshold", "unit", "verdict")
    return {
        check: {
            system: {metric["name"]: {key: metric[key] for key in keys} for metric in outcome["metrics"]}
            for system, outcome in systems.items()
        }
        for check, systems in checks.items()
    }


def run_all(options: argparse.Namespace) -> list[str]:
    """All runs that have no result yet; returns the failures."""
    results, runs = options.output / "results", (options.runs or options.output / "runs").absolute()
    results.mkdir(parents=True, exist_ok=True)
    where = machine(options.device, options.commit)  # what cannot be told is found before hours of work
    cores = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for n in range(options.at_once):  # more runs than cores share them
        free.put(cores[n] if options.at_once <= len(cores) else None)
    jobs = [(name, seed) for seed in options.seeds for name in options.networks]
    for known in read_results(results):
        if (known["network"], known["seed"]) in jobs:
            if known["overrides"] != sorted(options.overrides):
                raise SystemExit(f"{known['file']}: a run with the overrides {known['overrides']} is there already")
            jobs.remove((known["network"], known["seed"]))

    def work(job: tuple[str, int]) -> str | None:
        name, seed = job
        core, label = free.get(), f"{name}_seed{seed}"
        try:
            record = measure(name, seed, runs / label, options, core) | {"machine": where}
            partial = results / f".{label}.json"
            partial.write_text(json.dumps(record, indent=1) + "\n")
            partial.replace(results / f"{label}.json")
        except (RunFailed, OSError, ValueError, KeyError) as err:
            print(f"{label}: {type(err).__name__}: {err}", file=sys.stderr, flush=True)
            return label
        finally:
            free.put(core)
        known, new = (record["metrics"][key] for key in SETS)
        print(
            f"{label}: known {known['energy_mev_per_atom']:.1f} meV/atom, {known['share_of_zero_forces']:.1%}; new "
            f"{new['energy_mev_per_atom']:.0f} meV/atom, {new['share_of_zero_forces']:.1%}; "
            f"{passed(record)} of {len(CHECKS)} checks; {record['training']['wall_seconds']:.0f} s of training",
            flush=True,
        )
        return None

    with ThreadPoolExecutor(options.at_once) as pool:
        return [label for label in pool.map(work, jobs) if label is not None]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The runs recorded in a folder, with the file of each."""
    return [json.loads(file.read_text()) | {"file": str(file)} for file in sorted(folder.glob("[!.]*.json"))]


def passed(record: Mapping[str, Any]) -> int:
    """How many surface checks a run's potential passes."""
    return sum(record["checks"].get(check) == "pass" for check in CHECKS)


def mean_and_range(values: Sequence[float], form: str) -> str:
    """`3.0 (2.8 to 3.3)`; one value alone as it is."""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def missed_limits(check: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Quantities of a check that miss their limit in any run: over all runs, the largest of its systems' values."""
    largest: dict[str, list[float]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    failed = set()
    for record in runs:
        systems = record["figures"].get(check, {}).values()
        for quantity in {quantity for metrics in systems for quantity in metrics}:
            here = [metrics[quantity] for metrics in systems if quantity in metrics]
            values = [metric["value"] for metric in here if metric["value"] is not None]
            largest.setdefault(quantity, []).append(max(values, default=float("nan")))
            about[quantity] = here[0]
            if any(metric["verdict"] == "fail" for metric in here):
                failed.add(quantity)
    texts = []
    for quantity in sorted(failed):
        unit, limit = about[quantity]["unit"], about[quantity]["threshold"]
        span = " to ".join(dict.fromkeys(f"{value:.2g}" for value in (min(largest[quantity]), max(largest[quantity]))))
        texts.append(f"{quantity} {span} {unit} (limit {limit:g})".replace("  ", " "))
    return texts


class Tables:
    """Markdown of the results.

    Raises:
        ValueError: there are none, or they are not runs of the same configurations.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]]) -> None:
        if not results:
            raise ValueError("expected results, got none: run benchmarks/quickstart/run.py first")
        for key in ("overrides", "device"):
            if len({str(record[key]) for record in results}) > 1:
                which = ", ".join(f"{record['file']}: {record[key]}" for record in results)
                raise ValueError(f"{key}: expected the same in all runs, got {which}")
        self.results = results
        self.runs = {n: [r for r in results if r["network"] == n] for n in NETWORKS}
        self.runs = {name: runs for name, runs in self.runs.items() if runs}

    def _row(self, title: str, cells: Mapping[str, str]) -> str:
        return "| " + " | ".join([title, *(cells[name] for name in self.runs)]) + " |"

    def _head(self, title: str) -> list[str]:
        titles = {name: f"{NETWORKS[name].title}, `{NETWORKS[name].config}`" for name in self.runs}
        return [self._row(title, titles), "|---" * (1 + len(self.runs)) + "|"]

    def _compared(self, title: str, key: Any, forms: Sequence[tuple[Any, str]]) -> str:
        """A row of means and ranges, bold where every run of a network is better than every one of the others."""
        values = {name: [key(record) for record in runs] for name, runs in self.runs.items()}
        cells = {}
        for name, mine in values.items():
            others = [value for other, theirs in values.items() if other != name for value in theirs]
            better = len(mine) > 1 and bool(others) and max(mine) < min(others)
            text = ", ".join(mean_and_range([value(r) for r in self.runs[name]], form) for value, form in forms)
            cells[name] = f"**{text}**" if better else text
        return self._row(title, cells)

    def _errors(self, key: str) -> list[str]:
        """Energies, forces, and forces against zero forces, on a set of held-out structures."""
        energy = lambda r: r["metrics"][key]["energy_mev_per_atom"]  # noqa: E731
        force = lambda r: r["metrics"][key]["force_mae"]  # noqa: E731
        share = lambda r: 100 * r["metrics"][key]["share_of_zero_forces"]  # noqa: E731
        digits = "{:.1f}" if key == "omol.val_known" else "{:.0f}"
        return [
            self._compared(f"{SETS[key]}: energy, meV/atom", energy, [(energy, digits)]),
            self._compared(f"{SETS[key]}: forces, eV/Å", force, [(force, "{:.3f}")]),
            self._compared(f"{SETS[key]}: forces, % of zero forces'", share, [(share, "{:.1f}")]),
        ]

    def _time(self) -> str:
        seconds = lambda r: r["training"]["processor_seconds"]  # noqa: E731
        return self._compared("processor time of the whole command, s", seconds, [(seconds, "{:.0f}")])

    def errors(self) -> str:
        """All errors on held-out data, and what the table was made from."""
        lines = self._head("on held-out data")
        first = {name: runs[0] for name, runs in self.runs.items()}
        lines.append(self._row("parameters", {name: f"{r['parameters']:,}" for name, r in first.items()}))
        sizes = {name: f"{r['epochs']:g}, {r['steps']:,}" for name, r in first.items()}
        lines.append(self._row("epochs, steps", sizes))
        for key in SETS:
            lines += self._errors(key)
        counts = {name: mean_and_range([passed(r) for r in runs], "{:g}") for name, runs in self.runs.items()}
        lines.append(self._row(f"surface checks passed, of {len(CHECKS)}", counts))
        return "\n".join([*lines, self._time(), "", self.caption()])

    def summary(self) -> str:
        """The README's table: errors and time, no more."""
        lines = self._head("on held-out data")
        for key in SETS:
            lines += self._errors(key)[:2]
        caption = f"Mean and range of {self._runs()}, bold where each is better than every one of the other network."
        return "\n".join([*lines, self._time(), "", f"{caption} {self._origin()}"])

    def _runs(self) -> str:
        each = sorted({len(runs) for runs in self.runs.values()})
        return f"{' and '.join(map(str, each))} run{'s' * (each != [1])} each"

    def _origin(self) -> str:
        """Machine, commit and command."""
        machines = sorted({r["machine"].get("gpu") or r["machine"]["processor"] for r in self.results})
        commits = sorted({r["machine"]["commit"][:7] for r in self.results})
        together = sorted({r["side_by_side"] for r in self.results})
        return (
            f"{', '.join(machines)}, one core a run, {' or '.join(map(str, together))} side by side; commit "
            f"{', '.join(commits)}. Written by `python benchmarks/quickstart/run.py` from "
            "`benchmarks/quickstart/results`."
        )

    def caption(self) -> str:
        """What the tables were made from."""
        changed = f", with {' '.join(self.results[0]['overrides'])}" if self.results[0]["overrides"] else ""
        return (
            f"Mean and range of {self._runs()}, which differ in initial weights and order of batches{changed}; bold "
            "where each run is better than every one of the other network. Percentages are of the mean absolute force "
            f"component, the error of predicting zero. Same trainer, split and losses. {self._origin()}"
        )

    def checks(self) -> str:
        """For each surface check, how many of a network's runs pass, and by how much the others miss which limit."""
        lines = self._head("surface check: runs that pass")
        for check in CHECKS:
            cells = {}
            for name, runs in self.runs.items():
                found = [r["checks"].get(check, "none") for r in runs]
                others = sorted({verdict for verdict in found if verdict not in ("pass", "fail")})
                cells[name] = "; ".join(
                    [f"{found.count('pass')} of {len(found)}", *others, *missed_limits(check, runs)]
                )
            lines.append(self._row(f"`{check}`", cells))
        return "\n".join(lines)

    def molecules(self) -> str:
        """Errors on the molecules that training never sees."""
        lines = self._head("new molecule: energy, meV/atom; forces, eV/Å")
        for molecule in sorted({m for r in self.results for m in r["molecules"]["val_new"]}):
            cells = {}
            for name, runs in self.runs.items():
                found = [r["molecules"]["val_new"][molecule] for r in runs]
                energy = mean_and_range([f["energy_mev_per_atom"] for f in found], "{:.0f}")
                cells[name] = f"{energy}; {mean_and_range([f['force_mae'] for f in found], '{:.2f}')}"
            lines.append(self._row(molecule, cells))
        return "\n".join(lines)

    def page(self) -> str:
        """All tables."""
        return "\n\n".join(["# Quickstart", self.errors(), self.checks(), self.molecules()]) + "\n"


def replaced(text: str, name: str, table: str, file: str) -> str:
    """The text with what stands between the two markers of a name replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file}: expected {begin} and, after it, {end}, once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def write_tables(output: Path) -> None:
    """`tables.md` beside the results; README and docs, where they are this folder's."""
    tables = Tables(read_results(output / "results"))
    (output / "tables.md").write_text(tables.page())
    print(f"\n{tables.page()}")
    if output.resolve() == HERE:
        for file, name, table in (
            (ROOT / "README.md", "quickstart summary", tables.summary()),
            (ROOT / "docs" / "benchmarks.md", "quickstart table", tables.errors()),
            (ROOT / "docs" / "workflows.md", "quickstart checks", tables.checks()),
        ):
            file.write_text(replaced(file.read_text(), name, table, file.name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then make the tables; 1 where a run has failed."""
    options = arguments(argv)
    failures = [] if options.tables else run_all(options)
    try:
        write_tables(options.output)
    except ValueError as err:
        print(f"benchmarks/quickstart: {err}", file=sys.stderr)
        return 1
    if failures:
        print(f"failed, to be run again: {', '.join(failures)}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
