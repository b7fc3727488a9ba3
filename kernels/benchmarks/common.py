"""What the benchmarks share: systems, edges, models, timing, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from e2former_fairchem.config import E2FormerV2Config  # noqa: E402
from e2former_fairchem.graph import Graph  # noqa: E402
from e2former_fairchem.model import E2FormerV2  # noqa: E402
from e2former_fairchem.nn.output import EnergyMLP  # noqa: E402
from e2former_fairchem.segments import gather_rows  # noqa: E402

GIB = 1 << 30
#: The paper's network: 24.4 M parameters.
PAPER = {
    "lmax": 2, "sphere_channels": 256, "num_layers": 4, "num_heads": 128, "head_dim": 8, "num_radial_basis": 256,
    "value_multiplicity": 2, "cutoff": 6.0,
}  # fmt: skip


def water_cluster(molecules: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Open cluster of water at liquid density: jittered cubic lattice, random orientations.

    Returns positions [3 molecules, 3] in Å and atomic numbers [3 molecules].
    """
    rng = np.random.default_rng(seed)
    side = int(np.ceil(molecules ** (1 / 3)))
    index = np.arange(molecules)
    lattice = np.stack([index // (side * side), index // side % side, index % side], 1) * 3.104
    centres = lattice + rng.normal(0, 0.15, (molecules, 3))
    w, x, y, z = np.moveaxis(_unit(rng.normal(size=(molecules, 4))), 1, 0)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    shape = np.array([[0.0, 0.0, 0.0], [0.9572, 0.0, 0.0], [-0.24, 0.9266, 0.0]])
    atoms = centres[:, None] + np.einsum("abn,kb->nka", rotation, shape)
    return atoms.reshape(-1, 3), np.tile([8, 1, 1], molecules)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def edges_of(positions: np.ndarray, cutoff: float, neighbours: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(source, target), by target then source: all atoms within the cutoff, or the nearest ``neighbours`` of them."""
    tree = cKDTree(positions)
    number = len(positions)
    if neighbours is None:
        pairs = tree.query_pairs(cutoff, output_type="ndarray")
        target, source = np.concatenate([pairs, pairs[:, ::-1]]).T
    else:
        distance, index = tree.query(positions, neighbours + 1, distance_upper_bound=cutoff, workers=-1)
        keep = np.isfinite(distance)
        keep[:, 0] = False
        target, source = np.repeat(np.arange(number), neighbours + 1).reshape(index.shape)[keep], index[keep]
    order = np.lexsort((source, target))
    return source[order], target[order]


class System:
    """Atoms with their edges on a device, and what the network reads of them."""

    def __init__(self, atoms: int, neighbours: int | None, device: str, dtype=torch.float32, cutoff: float = 6.0):
        positions, numbers = water_cluster(atoms // 3)
        source, target = edges_of(positions, cutoff, neighbours)
        self.atoms, self.edges, self.cutoff = len(positions), len(source), cutoff
        self.pos = torch.tensor(positions, dtype=dtype, device=device)
        self.numbers = torch.tensor(numbers, device=device)
        self.source, self.target = (torch.tensor(x, device=device) for x in (source, target))
        self.row_ptr = torch.searchsorted(self.target, torch.arange(self.atoms + 1, device=device))
        self.charge = torch.zeros(1, dtype=torch.long, device=device)
        self.batch = torch.zeros(self.atoms, dtype=torch.long, device=device)
        graph = self.graph(self.pos)
        self.order, self.ptr = graph.source_order, graph.source_ptr

    def graph(self, pos: Tensor) -> Graph:
        """Graph whose vectors are differentiable in ``pos``."""
        graph = Graph(self.source, self.target, pos, None, None, self.row_ptr, self.cutoff, self.atoms)
        if hasattr(self, "order"):
            graph._source_order, graph._source_ptr = self.order, self.ptr
        graph.vec = gather_rows(pos, self.target, graph.by_target) - gather_rows(pos, self.source, graph.by_source)
        return graph


class Network(torch.nn.Module):
    """The trunk and the authors' energy head, with random weights."""

    def __init__(self, **config) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = E2FormerV2(E2FormerV2Config(**(PAPER | config)))
        self.head = EnergyMLP(self.trunk.config.sphere_channels)

    def energy(self, system: System, pos: Tensor) -> Tensor:
        charge = system.charge
        x = self.trunk(system.numbers, charge, charge, system.batch, pos, system.graph(pos))
        return self.head(x).double().sum()

    def energy_forces(self, system: System, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        pos = system.pos.detach().requires_grad_()
        energy = self.energy(system, pos)
        (slope,) = torch.autograd.grad(energy, pos, create_graph=create_graph)
        return energy, -slope

    def training_step(self, system: System, conserving: bool = True) -> Tensor:
        """Loss on energy and forces, backward to all parameters; no optimiser."""
        self.zero_grad(set_to_none=True)
        if conserving:
            energy, forces = self.energy_forces(system, create_graph=True)
        else:
            charge = system.charge
            x = self.trunk(system.numbers, charge, charge, system.batch, system.pos, system.graph(system.pos))
            energy, forces = self.head(x).double().sum(), x[:, 1:4].mean(-1)
        loss = energy.abs() / system.atoms + forces.square().sum(-1).add(1e-8).sqrt().mean()
        loss.backward()
        return loss


def measure(function: Callable[[], object], repeats: int = 5, warmup: int = 2) -> dict:
    """Median time and peak memory above what was there before. CUDA events on a GPU, a clock elsewhere."""
    try:
        for _ in range(warmup):
            function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        peak = torch.cuda.max_memory_allocated() - before
        return {"ms": statistics.median(times), "min_ms": min(times), "GiB": peak / GIB}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def machine() -> dict:
    """Where a result comes from: GPU, versions, commit."""
    command = ["git", "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("E2FORMER_COMMIT") or commit.stdout.strip() or "unknown",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def save(name: str, rows: dict, folder: str | None = None) -> None:
    """Write ``rows`` with the machine and the command beside them to ``results/name.json``."""
    path = Path(folder or Path(__file__).parent / "results")
    path.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"kernels/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    (path / f"{name}.json").write_text(
        json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n"
    )
