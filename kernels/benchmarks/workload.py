"""What the benchmarks share: systems, edges and the network; what times calls and keeps rows stands beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; before triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from records import Results, common_arguments, save, table  # noqa: E402
from timing import GIB, attempt, ceilings, free, measure, measure_graph  # noqa: E402

from e2former_fairchem.config import E2FormerV2Config  # noqa: E402
from e2former_fairchem.graph import Graph  # noqa: E402
from e2former_fairchem.model import E2FormerV2  # noqa: E402
from e2former_fairchem.nn.readouts import EnergyMLP  # noqa: E402
from e2former_fairchem.segments import Transposed, gather_rows  # noqa: E402
from e2former_kernels.common.chunks import EdgeList  # noqa: E402

__all__ = [
    "GIB", "PAPER", "ROOT", "TINY", "Network", "Results", "System", "attempt", "ceilings", "common_arguments",
    "edges_of", "free", "measure", "measure_graph", "relative_error", "save", "table", "water_cluster",
]  # fmt: skip

#: The paper's network: 24.4 M parameters.
PAPER = {
    "lmax": 2, "sphere_channels": 256, "num_layers": 4, "num_heads": 128, "head_dim": 8, "num_radial_basis": 256,
    "value_multiplicity": 2, "cutoff": 6.0,
}  # fmt: skip
#: Widths for trying a benchmark out on a CPU.
TINY = {
    "sphere_channels": 4, "num_layers": 1, "num_heads": 2, "head_dim": 2, "num_radial_basis": 8,
    "value_multiplicity": None,
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
    """(source, target), by target then source: all atoms within the cutoff, or the nearest ``neighbours`` of them.

    No two atoms may be in one place. Seconds for a million atoms: the search runs on all cores, and no list of edges is
    sorted by comparison of pairs.
    """
    number, tree = len(positions), cKDTree(positions)
    if neighbours is None:
        pairs = tree.query_pairs(cutoff, output_type="ndarray")
        key = np.concatenate([pairs[:, 0] * number + pairs[:, 1], pairs[:, 1] * number + pairs[:, 0]])
        key = torch.from_numpy(key)
        key = (key.cuda() if torch.cuda.is_available() else key).sort().values.cpu().numpy()
        return key % number, key // number
    _, index = tree.query(positions, neighbours + 1, distance_upper_bound=cutoff, workers=-1)
    index[:, 0] = number  # the atom itself; the search fills up with the same number
    index.sort(axis=1)
    found = index < number
    return index[found], np.repeat(np.arange(number), found.sum(axis=1))


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

    def edge_list(self) -> EdgeList:
        """The edges as the operations take them; nothing made of them is kept."""
        return EdgeList(self.source, self.target, self.row_ptr, self.numbers, lambda: (self.order, self.ptr))

    def graph(self, pos: Tensor) -> Graph:
        """Graph whose vectors are differentiable in ``pos``."""
        graph = Graph(self.source, self.target, pos, None, None, self.row_ptr, self.cutoff, self.atoms)
        if hasattr(self, "order"):
            graph.senders = Transposed(self.source, self.atoms, self.order, self.ptr)
        graph.vec = gather_rows(pos, self.target, graph.by_target) - gather_rows(pos, self.source, graph.by_source)
        return graph


class Network(torch.nn.Module):
    """The trunk and the authors' energy head, with random weights."""

    def __init__(self, **config) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = E2FormerV2(E2FormerV2Config(**(PAPER | config)))
        self.head = EnergyMLP(self.trunk.config.sphere_channels)

    def freeze(self) -> Network:
        """Weights get no gradients, and what is made of them is kept."""
        self.requires_grad_(False)
        self.trunk.freeze()
        return self

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

    def forget(self) -> None:
        """Drop captured CUDA graphs, whose memory would count as there before the next measurement."""
        if self.trunk._frozen is not None:
            self.trunk._frozen.replays = None


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())
