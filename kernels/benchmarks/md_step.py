"""One NVE step through FAIRChemCalculator and ASE, and where its time goes; eSCN-MD of UMA-S's shape beside it.

python kernels/benchmarks/md_step.py [--atoms 999] [--models paper_32 paper omol25 omol25_conserving escn] [--compile]

ASE's VelocityVerlet, 0.5 fs, an open cluster of water at 300 K, wall clock of a whole step: positions to the model,
neighbour list, energy and forces, forces back. Weights are random, energies scaled so that the molecules stay whole.
Models: ``paper_32`` the paper's network with its 32 nearest neighbours, ``paper`` the same with all within 6 Å,
``omol25`` and ``omol25_conserving`` our backbone configs (the first has direct forces), ``escn`` UMA-S's shape in the
fastest mode that fairchem chooses. Inference settings: fairchem's default without compilation (TF32, merged experts);
--compile adds every model compiled, --precision highest is strict float32.

ms is the median step. The split is measured in further steps that wait for the GPU between the parts, so its sum is a
little more: neighbours_ms the neighbour list, model_ms the rest of the predict unit's call, rest_ms ASE and the
conversion. Our networks replay their trunk from CUDA graphs after a few steps (``cuda_graph``); --no-cuda-graph is
without.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from gate import gate
from predictors import cluster, escn, execution_mode, ours, parameters_of, predict_unit, quiet, settings_of
from timing import synchronize
from workload import Results, attempt, common_arguments, free, table

TIMESTEP = 0.5  # fs
MODELS = {
    "paper_32": ("paper", {"max_neighbors": 32}),
    "paper": ("paper", {}),
    "omol25": ("e2former_v2_omol25", {}),
    "omol25_conserving": ("e2former_v2_omol25_conserving", {}),
    "escn": None,
}
#: Where each package builds its neighbour list.
NEIGHBOURS = ("e2former_fairchem.backbone.build_graph", "fairchem.core.models.uma.escn_md.generate_graph")


class Clock:
    """Time spent in functions that are replaced while it runs, ms, the GPU's work included."""

    def __init__(self) -> None:
        self.ms = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args, **kwargs) -> Any:
            synchronize()
            start = time.perf_counter()
            out = function(*args, **kwargs)
            synchronize()
            self.ms += 1e3 * (time.perf_counter() - start)
            return out

        return timed


@contextlib.contextmanager
def split(unit: Any) -> Iterator[tuple[Clock, Clock]]:
    """Clocks of the neighbour list and of the whole predict call."""
    neighbours, predict = Clock(), Clock()
    with contextlib.ExitStack() as stack:
        for path in NEIGHBOURS:
            module, name = path.rsplit(".", 1)
            found = getattr(__import__(module, fromlist=[name]), name)
            stack.enter_context(mock.patch(path, neighbours.around(found)))
        stack.enter_context(mock.patch.object(unit, "predict", predict.around(unit.predict)))
        yield neighbours, predict


def build(name: str, args, compiled: bool) -> Any:
    """Predict unit of one of MODELS."""
    settings = replace(settings_of(compiled), tf32=args.precision == "high")
    if MODELS[name] is None:
        return predict_unit(escn(args.tiny), args.device, settings)
    config, changes = MODELS[name]
    changes = {"cuda_graph": not args.no_cuda_graph} | changes
    if args.device == "cpu":
        changes["kernel_backend"] = "reference"
    return predict_unit(ours(config, args.tiny, **changes), args.device, settings)


def row_of(name: str, args, compiled: bool) -> dict:
    """Median step, its split, and the rate."""
    from ase import units
    from ase.md.verlet import VelocityVerlet
    from fairchem.core import FAIRChemCalculator

    unit = build(name, args, compiled)
    atoms = cluster(args.atoms)
    atoms.calc = FAIRChemCalculator(unit, task_name="omol")
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    start = atoms.get_total_energy()
    before = time.perf_counter()
    dynamics.run(args.warmup)
    warmup = time.perf_counter() - before
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = [timed_step(dynamics) for _ in range(args.steps)]
    row: dict = {"ms": statistics.median(steps), "min_ms": min(steps), "max_ms": max(steps)}
    if args.device == "cuda":
        row["total_GiB"] = torch.cuda.max_memory_reserved() / (1 << 30)
    if not compiled:
        parts = []
        with split(unit) as (neighbours, predict):
            for _ in range(max(args.steps // 3, 2)):
                neighbours.ms = predict.ms = 0.0
                whole = timed_step(dynamics)
                parts.append((neighbours.ms, predict.ms - neighbours.ms, whole - predict.ms))
        for key, values in zip(("neighbours_ms", "model_ms", "rest_ms"), zip(*parts, strict=True), strict=True):
            row[key] = statistics.median(values)
    row["ns_per_day"] = TIMESTEP * 86.4 / row["ms"]
    row["drift_meV_per_atom"] = 1e3 * abs(atoms.get_total_energy() - start) / len(atoms)
    return row | {"parameters": parameters_of(unit), "mode": execution_mode(unit), "warmup_s": round(warmup, 1)}


def timed_step(dynamics: Any) -> float:
    synchronize()
    start = time.perf_counter()
    dynamics.run(1)
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = common_arguments(__doc__, "md_step")
    parser.add_argument("--atoms", type=int, default=999)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="every model compiled too")
    parser.add_argument("--no-cuda-graph", action="store_true", help="never replay the trunk from CUDA graphs")
    args = parser.parse_args()
    if not args.no_gate:
        gate(args.device, args.tiny, ("qk", "qk_dot"))
    results = Results(args.name, args.output)
    for compiled in (False, True) if args.compile else (False,):
        for name in args.models:
            with quiet():
                row = attempt(lambda n=name, c=compiled: row_of(n, args, c))
            results.add(f"{name}{'_compiled' if compiled else ''}/{args.atoms}", row)
            free()
    print(table(results, ("ms", "min_ms", "neighbours_ms", "model_ms", "rest_ms", "ns_per_day")))


if __name__ == "__main__":
    main()
