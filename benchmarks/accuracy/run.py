"""Accuracy on acetylacetone (AcAc) and 3BPA, trained on 300 K: this project's network and fairchem's eSCN-MD.

    python benchmarks/accuracy/run.py acac --data FOLDER --steps 5000 --seeds 0 1 2 --device CUDA
    python benchmarks/accuracy/run.py 3bpa backbone.num_layers=4 --data FOLDER --networks e2former_v2 --steps 40000
    python benchmarks/accuracy/run.py --tables

FOLDER has the xyz files as published (github.com/davkovacs/BOTNet-datasets). Each run is fairchem's own command
line in a process of its own, on configs/quickstart.yaml or configs/baselines/escn_md_quickstart.yaml with 64 channels,
3 layers, 5 Å and batches of 10, of 450 structures; 50 others validate. KEY=VALUE overrides are of all trainings of a
call and stand in the results. A finished run is one JSON file; runs that have theirs are left out. A run that was
stopped goes on from its last checkpoint with --resume, and the seconds add up.

Tested are energies of molecules (meV) and force components (meV/Å), root mean square and mean absolute, in strict
float32 and with fairchem's default preset, and energies along curves. --tables writes tables.md and curves.png beside
the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))
from run import FAIRCHEM, RunFailed, machine, run_command  # noqa: E402

TRAINED, VALIDATED = 450, 50
BATCH = 10
#: Files to train on, to test on and with energies along a curve.
DATA = {
    "acac": {
        "train": "train_300K.xyz",
        "tests": {"300 K": "test_MD_300K.xyz", "600 K": "test_MD_600K.xyz"},
        "curves": {"dihedral": "test_dihedral.xyz", "H transfer": "test_H_transfer.xyz"},
    },
    "3bpa": {"train": "train_300K.xyz", "tests": {"mixed T": "train_mixedT.xyz"}, "curves": {}},
}
SHAPE = ("backbone.sphere_channels=64", "backbone.num_layers=3", "backbone.cutoff=5.0", f"batch_size={BATCH}")
ESCN = ("backbone.hidden_channels=64", "backbone.edge_channels=64")
NETWORKS = {
    "e2former_v2": ("configs/quickstart.yaml", (*SHAPE, "backbone.num_heads=32")),
    "escn_md": ("configs/baselines/escn_md_quickstart.yaml", (*SHAPE, *ESCN)),
}
TITLES = {"e2former_v2": "E2Former-V2", "escn_md": "eSCN-MD"}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("set", nargs="?", choices=list(DATA))
    parser.add_argument("--data", type=Path, help="folder of the set's xyz files")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--device", default="CPU", type=str.upper, choices=("CPU", "CUDA"))
    parser.add_argument("--resume", action="store_true", help="go on with runs that were stopped")
    parser.add_argument("--output", type=Path, default=HERE, help="results go to OUTPUT/results (default: here)")
    parser.add_argument("--runs", type=Path, help="folder of data, checkpoints and logs (default: OUTPUT/runs)")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--tables", action="store_true", help="only make the tables of the results that are there")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    found = parser.parse_args(argv)
    found.overrides.sort()
    if wrong := [text for text in found.overrides if "=" not in text]:
        parser.error(f"overrides: expected KEY=VALUE, got {wrong}")
    if not found.tables and (found.set is None or found.data is None):
        parser.error("expected a set and --data FOLDER, or --tables")
    return found


def read(file: Path) -> list[Any]:
    """Structures of an xyz file, without the box around the molecule; energies in ``info``."""
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import read as read_file

    frames = read_file(file, ":")
    for n, atoms in enumerate(frames):
        labels = dict(atoms.calc.results)
        atoms.set_cell(None)
        atoms.pbc = False
        atoms.calc = SinglePointCalculator(atoms, **labels)
        atoms.info = {
            "charge": 0,
            "spin": 1,
            "source": f"{file.name}@{n}",
            "data_id": file.stem,
            "num_atoms": len(atoms),
        }
    return frames


def prepare(name: str, source: Path, folder: Path) -> None:
    """Write the training and validation data, and references by least squares, once."""
    from e2former_fairchem.data.make_sample import write_folder
    from e2former_fairchem.files import write_json

    if (folder / "references.json").is_file():
        return
    frames = read(source / DATA[name]["train"])
    if len(frames) != TRAINED + VALIDATED:
        raise SystemExit(
            f"{source / DATA[name]['train']}: expected {TRAINED + VALIDATED} structures, got {len(frames)}"
        )
    order = np.random.default_rng(0).permutation(len(frames))
    folder.mkdir(parents=True, exist_ok=True)
    write_folder([frames[n] for n in order[:TRAINED]], folder / "train")
    write_folder([frames[n] for n in order[TRAINED:]], folder / "val")
    counts = np.array([np.bincount(atoms.numbers, minlength=119) for atoms in frames])[order[:TRAINED]]
    energies = np.array([atoms.calc.results["energy"] for atoms in frames])[order[:TRAINED]]
    fitted = np.linalg.lstsq(counts.astype(float), energies, rcond=None)[0]
    there = np.flatnonzero(counts.sum(0))
    table = {str(z): float(fitted[z]) for z in there}
    write_json(folder / "references.json", {"element_references": table, "unit": "eV", "structures": TRAINED})


def train(name: str, seed: int, folder: Path, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train to the end; returns seconds, of earlier calls too."""
    config, overrides = NETWORKS[name]
    epochs = max(round(options.steps * BATCH / TRAINED), 1)
    seconds = folder / "seconds.json"
    spent = json.loads(seconds.read_text()) if seconds.is_file() else []
    resumable = sorted(folder.glob("*/checkpoints/step_*/resume.yaml"), key=lambda p: int(p.parent.name.split("_")[1]))
    if resumable and options.resume:
        command = [*FAIRCHEM, "-c", str(resumable[-1])]
    else:
        command = [
            *FAIRCHEM, "-c", config, "dataset=folders", f"data_train={data / 'train'}", f"data_val={data / 'val'}",
            f"element_references={data / 'references.json'}", f"job.device_type={options.device}", *overrides,
            f"epochs={epochs}", f"evaluate_every={epochs}", f"job.run_dir={folder}", f"job.seed={seed}",
            f"train_dataloader.batch_sampler_fn.seed={seed}", *options.overrides,
        ]  # fmt: skip
    begin = time.monotonic()
    try:
        run_command(command, folder.with_suffix(f".{len(spent)}.log"), None)
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        seconds.write_text(json.dumps([*spent, round(time.monotonic() - begin, 1)]))
    return {"epochs": epochs, "steps": epochs * TRAINED // BATCH, "seconds": sum(json.loads(seconds.read_text()))}


def evaluate(name: str, source: Path, checkpoint: Path, device: str) -> dict[str, Any]:
    """Errors on the test files in both precisions, and energies along the curves in strict float32."""
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    from e2former_fairchem.own_data.errors import predict

    found: dict[str, Any] = {}
    for precision in ("strict", "default"):
        settings = InferenceSettings(tf32=False, compile=False) if precision == "strict" else "default"
        unit = load_predict_unit(str(checkpoint), inference_settings=settings, device=device.lower())
        for title, file in DATA[name]["tests"].items():
            frames = read(source / file)
            said = predict(unit, frames)
            energy = said.energies - [atoms.calc.results["energy"] for atoms in frames]
            forces = np.concatenate(said.forces) - np.concatenate([atoms.calc.results["forces"] for atoms in frames])
            found.setdefault("tests", {}).setdefault(title, {})[precision] = {
                "energy_rmse_mev": 1000 * float(np.sqrt(np.mean(energy**2))),
                "energy_mae_mev": 1000 * float(np.mean(np.abs(energy))),
                "force_rmse_mev": 1000 * float(np.sqrt(np.mean(forces**2))),
                "force_mae_mev": 1000 * float(np.mean(np.abs(forces))),
            }
        if precision == "strict":
            for title, file in DATA[name]["curves"].items():
                frames = read(source / file)
                exact = [atoms.calc.results["energy"] for atoms in frames]
                found.setdefault("curves", {})[title] = {
                    "exact": exact,
                    "found": predict(unit, frames).energies.tolist(),
                }
    return found


def run_all(options: argparse.Namespace) -> list[str]:
    """All runs that have no result yet; returns the failures."""
    runs = (options.runs or options.output / "runs").absolute()
    results = options.output / "results"
    results.mkdir(parents=True, exist_ok=True)
    data = runs / options.set
    prepare(options.set, options.data, data)
    where = machine(options.device, options.commit)
    digest = hashlib.sha256(" ".join(options.overrides).encode()).hexdigest()[:6] if options.overrides else ""

    def work(job: tuple[str, int]) -> str | None:
        name, seed = job
        label = "_".join(filter(None, [options.set, name, f"{options.steps}steps", digest, f"seed{seed}"]))
        file = results / f"{label}.json"
        if file.is_file():
            return None
        try:
            training = train(name, seed, runs / label, data, options)
        except RunFailed as error:
            return str(error)
        record = {"set": options.set, "network": name, "seed": seed, "overrides": options.overrides, **training}
        record |= {"side_by_side": options.at_once, "machine": where}
        record |= evaluate(options.set, options.data, runs / label / "inference_ckpt.pt", options.device)
        partial = file.with_name(f".{file.name}")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(file)
        print(label, {title: errors["strict"] for title, errors in record["tests"].items()}, flush=True)
        return None

    jobs = [(name, seed) for seed in options.seeds for name in options.networks]
    with ThreadPoolExecutor(options.at_once) as pool:
        return [failure for failure in pool.map(work, jobs) if failure]


def tables(folder: Path) -> str:
    """Markdown of all results: mean and range over seeds of what differs in nothing else."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for file in sorted((folder / "results").glob("*.json")):
        record = json.loads(file.read_text())
        groups[record["set"], record["network"], record["steps"], " ".join(record["overrides"])].append(record)
    lines = []
    for name in DATA:
        mine = {key: group for key, group in groups.items() if key[0] == name}
        if not mine:
            continue
        tests = list(DATA[name]["tests"])
        lines += [f"| {name}, trained on 300 K | steps | seeds | seconds | " + " | ".join(tests) + " |"]
        lines += ["|" + "---|" * (4 + len(tests))]
        for (_, network, steps, overrides), group in sorted(mine.items()):
            cells = [f"{TITLES[network]}{', `' + overrides + '`' if overrides else ''}", f"{steps:,}", str(len(group))]
            cells.append(f"{statistics.mean(r['seconds'] for r in group):.0f}")
            for test in tests:
                both = [
                    spread([r["tests"][test]["strict"][f"{kind}_rmse_mev"] for r in group])
                    for kind in ("energy", "force")
                ]
                cells.append("; ".join(both))
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Root mean square errors in strict float32: energy, meV; forces, meV/Å. Mean (range).", ""]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def draw(folder: Path) -> None:
    """Energies along the curves of all runs, from each curve's lowest exact energy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))]
    records = [record for record in records if "curves" in record]
    if not records:
        return
    titles = list(records[0]["curves"])
    figure = Figure(figsize=(5 * len(titles), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, title in zip(np.atleast_1d(figure.subplots(1, len(titles))), titles, strict=True):
        exact = np.array(records[0]["curves"][title]["exact"])
        axes.plot(1000 * (exact - exact.min()), "k.", label="DFT")
        for record in records:
            found = np.array(record["curves"][title]["found"])
            label = f"{TITLES[record['network']]}, {record['steps']:,} steps, seed {record['seed']}"
            axes.plot(1000 * (found - exact.min()), lw=1, label=label)
        axes.set(title=title, xlabel="structure", ylabel="energy, meV")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    figure.savefig(folder / "curves.png", dpi=120)


def main() -> None:
    """Run and make the tables."""
    options = arguments()
    failures = [] if options.tables else run_all(options)
    text = tables(options.output)
    (options.output / "tables.md").write_text(text + "\n")
    draw(options.output)
    print(text)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
