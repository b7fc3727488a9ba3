"""Batches of few sizes, made in the loader's workers: checks, neighbours, targets and padding.

What a training step needs of a batch is one block of memory, which goes to the GPU in one copy. Padding atoms are one
more molecule, joined to themselves by the edges that are left, and masks keep them out of every loss. Their share of
every gradient is zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.segments import Transposed, gather_rows
from e2former_fairchem.spatial_order import spatial_order
from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.validation import check_batch

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.mlip_unit import Task

    from e2former_fairchem.backbone import E2FormerV2Backbone

__all__ = ["PaddedBatch", "PaddingCollater", "Sizes", "padded_sizes"]

#: Sizes of atoms and of edges to a factor of two: padding adds at most 9 % to either, 4 % on average.
SIZES_PER_OCTAVE = 8
#: Hydrogen; which element padding atoms have changes nothing.
PADDING_ELEMENT = 1
#: A step that may be captured works on all edges at once, on up to so many times what the kernels take at a time
#: otherwise: working memory (some 3 GB at most with the paper's network) for a step without the host.
_MOST_CHUNKS = 2
#: Bytes from which a tensor may start in a batch's block.
_ALIGNMENT = 256


class Sizes(NamedTuple):
    """Numbers of atoms, edges and systems of a padded batch."""

    atoms: int
    edges: int
    systems: int


def padded_sizes(atoms: int, edges: int, systems: int) -> Sizes:
    """The sizes that a batch is padded to, with room for at least one padding atom in a system of its own.

    A padding atom gets at most about twice as many edges as an atom of the batch.
    """
    room = _next_size(edges)
    degree = 2 * max(edges // atoms, 16)
    return Sizes(_next_size(atoms + max(-(-(room - edges) // degree), 1)), room, max(1 << systems.bit_length(), 16))


def _next_size(least: int) -> int:
    """The smallest size from ``least`` on: multiples of 8, in steps of at most 9 % from 64 on."""
    exponent = 0
    while (size := 8 * round(2 ** (3 + exponent / SIZES_PER_OCTAVE) / 8)) < least:
        exponent += 1
    return size


class _Place(NamedTuple):
    """Where a tensor stands in a block of memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    bytes: int


@dataclass
class PaddedBatch:
    """What a training step needs of a batch, padded.

    memory: [bytes] uint8, all tensors one after the other. places: where they stand. sizes: padded.
    structures, atoms: without padding. captured: whether the step may come from a CUDA graph. sid: names of the
    structures, for messages. states: their charges and multiplicities.

    The tensors: ``pos``, ``cell``, ``atomic_numbers``, ``batch``, ``natoms``, ``charge``, ``spin`` of the atoms and
    systems; ``source``, ``target``, ``order``, ``row_ptr``, ``source_ptr``, ``shift`` of the edges
    (`e2former_fairchem.graph.Graph`), with ``pbc`` and ``offset`` where stress is trained, ``shift`` then being that of
    padding alone; ``target TASK`` and ``mask TASK``; ``counts``, see `counted`.
    """

    memory: Tensor
    places: tuple[_Place, ...]
    sizes: Sizes
    structures: int
    atoms: int
    captured: bool
    sid: Sequence[str]
    states: frozenset[tuple[int, int]]

    def pin_memory(self) -> PaddedBatch:
        """In memory that a GPU can read from while the host goes on; the loader calls it."""
        self.memory = self.memory.pin_memory()
        return self

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors of a block with this batch's places, by name."""
        return {
            name: memory[first : first + size].view(dtype).view(shape)
            for name, dtype, shape, first, size in self.places
        }


def _packed(tensors: dict[str, Tensor]) -> tuple[Tensor, tuple[_Place, ...]]:
    places, end = [], 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        places.append(_Place(name, value.dtype, tuple(value.shape), end, size))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    memory = torch.zeros(end, dtype=torch.uint8)
    for place, value in zip(places, tensors.values(), strict=True):
        memory[place.first : place.first + place.bytes].view(place.dtype).view(place.shape).copy_(value)
    return memory, tuple(places)


class PaddingCollater:
    """A collater's batches as `PaddedBatch`.

    Args:
        collate: the collater, whose batches are fairchem's `AtomicData`.
        backbone: for cutoff, neighbours and elements.
        tasks: that are trained; their references and normalisers are copied.
    """

    def __init__(self, collate: Callable[[list], AtomicData], backbone: E2FormerV2Backbone, tasks: Sequence[Task]):
        self.collate = collate
        self.cutoff, self.max_neighbors = backbone.cutoff, backbone.max_neighbors
        self.max_num_elements = backbone.max_num_elements
        self.stress = backbone.regress_config.stress
        self.targets = [_Target(task) for task in tasks]

    @torch.no_grad()
    def __call__(self, structures: list) -> PaddedBatch:
        """Raises as the collater, and ValueError for a batch that the backbone refuses."""
        batch = self.collate(structures)
        charge, spin = check_batch(batch, self.max_num_elements)
        numbers = batch["atomic_numbers"] = batch["atomic_numbers"].long()
        batch["atomic_numbers_full"], batch["batch_full"] = numbers, batch["batch"]
        keys = ("pos", "cell", "pbc", "batch", "natoms")
        graph = build_graph(*(batch[key] for key in keys), self.cutoff, self.max_neighbors)
        sizes = padded_sizes(graph.num_nodes, graph.num_edges, charge.numel())
        given = _padded_graph(graph, sizes) | _padded_atoms(batch, charge, spin, sizes)
        if self.stress:  # shifts depend on the cell, which the step differentiates by
            given |= {"pbc": _rows(batch["pbc"], sizes.systems), "offset": torch.zeros_like(given["shift"])}
        if graph.offset is not None:
            offset = graph.offset.double()
            if self.stress:
                given["offset"][: graph.num_edges] = offset
            else:  # as exact as in the graph, which rounds once
                cells = batch["cell"].double()[batch["batch"][graph.target]]
                given["shift"][: graph.num_edges] = (offset.unsqueeze(-1) * cells).sum(1)
        counts = []
        for target in self.targets:
            values, mask, count = target(batch)
            rows = sizes.atoms if target.level == "atom" else sizes.systems
            given |= {f"target {target.name}": _rows(values, rows), f"mask {target.name}": _rows(mask, rows)}
            counts.append(count)
        there = torch.zeros(self.max_num_elements + 1, dtype=torch.int64).index_fill_(0, numbers, 1)
        given["counts"] = torch.cat([torch.tensor(counts), there])
        memory, places = _packed(given)
        return PaddedBatch(
            memory,
            places,
            sizes,
            structures=charge.numel(),
            atoms=graph.num_nodes,
            captured=spatial_order(batch["pos"], batch["batch"], graph) is None,
            sid=list(batch.sid),
            states=states(charge, spin),
        )


def states(charge: Tensor, spin: Tensor) -> frozenset[tuple[int, int]]:
    """Charge (e) and multiplicity of structures, each pair once. charge, spin: [B], on the host."""
    return frozenset(zip(charge.long().tolist(), spin.long().tolist(), strict=True))


def counted(counts: Tensor, tasks: Sequence[Task]) -> tuple[Iterator[Tensor], Tensor]:
    """What workers sum before a step: each task's number of labels (or systems), and [Z] whether elements are there."""
    return iter(counts[: len(tasks)]), counts[len(tasks) :]


class _Target:
    """What fairchem's `compute_loss` compares a prediction of a task with, and which rows it counts."""

    def __init__(self, task: Task) -> None:
        self.name, self.level = task.name, task.level
        self.free_only = task.level == "atom" and task.train_on_free_atoms
        self.systems = isinstance(task.loss_fn, PerSystemSumLoss)
        self.width = math.prod(task.out_spec.dim)
        self.references = copy.deepcopy(task.element_references)
        self.normalizer = copy.deepcopy(task.normalizer).cpu()
        if self.references is not None:
            self.references.cpu()

    def __call__(self, batch: AtomicData) -> tuple[Tensor, Tensor, int]:
        """[rows, width] with zeros where there is no label, [rows] mask, and the number of rows or systems to count."""
        target = batch[self.name]
        mask = torch.isfinite(target.view(target.shape[0], -1)).all(1)
        if self.free_only:
            mask = mask & (batch.fixed == 0)
        if self.references is not None:
            target = self.references.apply_refs(batch, target)
        target = self.normalizer.norm(target).view(-1, self.width)
        count = batch.natoms.numel() if self.systems else int(mask.sum())
        return torch.nan_to_num(target, posinf=0.0, neginf=0.0), mask, count


def _rows(values: Tensor, rows: int, value: float = 0) -> Tensor:
    """With more rows, of ``value``."""
    return pad(values, (0, 0) * (values.dim() - 1) + (0, rows - values.shape[0]), value=value)


def _padded_atoms(batch: AtomicData, charge: Tensor, spin: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    atoms, systems = batch["pos"].shape[0], charge.numel()
    natoms = _rows(batch["natoms"].long(), sizes.systems)
    natoms[systems] = sizes.atoms - atoms
    return {
        "pos": _rows(batch["pos"], sizes.atoms),
        "cell": _rows(batch["cell"], sizes.systems),
        "atomic_numbers": _rows(batch["atomic_numbers"], sizes.atoms, PADDING_ELEMENT),
        "batch": _rows(batch["batch"].long(), sizes.atoms, systems),
        "natoms": natoms,
        "charge": _rows(charge, sizes.systems),
        "spin": _rows(spin, sizes.systems),
    }


def _padded_graph(graph: Graph, sizes: Sizes) -> dict[str, Tensor]:
    """Edge p of the free ones joins padding atom floor(p K / free), of K, to itself, over half the cutoff."""
    nodes, edges = graph.num_nodes, graph.num_edges
    free, padding = sizes.edges - edges, sizes.atoms - nodes
    number = torch.arange(max(sizes.edges, padding + 1))
    owner = (number[:free] * padding).div(max(free, 1), rounding_mode="floor") + nodes
    last = (number[1 : padding + 1] * free + (padding - 1)).div(padding, rounding_mode="floor") + edges
    shift = torch.zeros(sizes.edges, 3, dtype=torch.float64)
    shift[edges:, 0] = -0.5 * graph.cutoff
    return {
        "source": torch.cat([graph.source, owner]),
        "target": torch.cat([graph.target, owner]),
        "order": torch.cat([graph.source_order, number[edges : sizes.edges]]),
        "row_ptr": torch.cat([graph.row_ptr, last]),
        "source_ptr": torch.cat([graph.source_ptr, last]),
        "shift": shift,
    }


def padded_graph(given: Mapping[str, Tensor], pos: Tensor, cell: Tensor, cutoff: float, one_chunk: bool) -> Graph:
    """The graph of a padded batch; vectors are rounded once, as those of `e2former_fairchem.graph.build_graph`."""
    nodes = pos.shape[0]
    senders = Transposed(given["source"], nodes, given["order"], given["source_ptr"])
    graph = Graph(
        given["source"],
        given["target"],
        pos,
        None,
        None,
        given["row_ptr"],
        cutoff,
        nodes,
        senders=senders,
        one_chunk=_MOST_CHUNKS if one_chunk else 0,
    )
    with torch.autocast(pos.device.type, enabled=False):
        wide = pos.double()
        apart = gather_rows(wide, graph.target, graph.by_target) - gather_rows(wide, graph.source, graph.by_source)
        if "offset" in given:
            first_atom = torch.cat([given["natoms"].new_zeros(1), given["natoms"].cumsum(0)])
            edges_of_systems = graph.row_ptr[first_atom]
            system = given["batch"][graph.target]
            cells = gather_rows(cell.double().view(-1, 9), system, lambda: (None, edges_of_systems)).view(-1, 3, 3)
            apart = apart - (given["offset"].unsqueeze(-1) * cells).sum(1)
        graph.vec = (apart - given["shift"]).to(pos.dtype)
    return graph
