"""Training steps from CUDA graphs: forward, forces, losses and all gradients in one launch.

A small step is bound by the host, which launches a thousand kernels that take microseconds each. A CUDA graph replays
them on fixed memory, so a batch is padded to one of few sizes: padding atoms form one more molecule, joined to
themselves by the edges that are left, and masks keep them out of every loss. Their share of every gradient is zero.

The size depends on the batch alone, and so do the numbers: a size that comes up for the first times runs padded
without a graph, which gives the bits that its replays give. What the host must know of a batch (neighbours, checks of
its values) is found on a stream of its own while the GPU still works on the step before.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from fairchem.core.common import distutils, gp_utils
from fairchem.core.modules.loss import DDPMTLoss, L2NormLoss, MAELoss, MSELoss, PerAtomMAELoss
from fairchem.core.units.mlip_unit.mlip_unit import Task, TrainStrategy
from fairchem.core.units.mlip_unit.utils import tf32_context_manager
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.graph import Graph
from e2former_fairchem.heads import E2FormerV2DirectForceHead, E2FormerV2EnergyHead, E2FormerV2GradientHead
from e2former_fairchem.segments import Transposed, row_differences
from e2former_fairchem.spatial_order import spatial_order
from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.validation import log_once
from e2former_kernels.common.backend import resolve_backend
from e2former_kernels.common.plan import SeveralRuns
from e2former_kernels.compat import foreach_copy_

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit

__all__ = ["Replays", "Sizes", "padded_sizes", "why_eager"]

#: Sizes of atoms and of edges to a factor of two: padding adds at most 9 % to either, 4 % on average.
SIZES_PER_OCTAVE = 8
#: Steps of a size without a graph before it is captured, which takes as long as a few of them.
STEPS_BEFORE = 2
#: Captures that may fail before no more is tried.
MAX_FAILURES = 3
#: Hydrogen; which element padding atoms have changes nothing.
PADDING_ELEMENT = 1
_HEADS = (E2FormerV2EnergyHead, E2FormerV2DirectForceHead, E2FormerV2GradientHead)
_LOSSES = (L2NormLoss, MAELoss, MSELoss, PerAtomMAELoss)


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


def why_eager(unit: MLIPTrainEvalUnit, model: nn.Module) -> str | None:
    """Why no step of a unit that trains ``model`` can be padded; None where it can."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, E2FormerV2Backbone):
        return f"the backbone is {type(backbone).__name__}"
    config = backbone.config
    stranger = next((head for head in model.output_heads.values() if not isinstance(head, _HEADS)), None)
    reasons = [
        (unit.train_strategy != TrainStrategy.DDP, f"train_strategy is {unit.train_strategy}"),
        (gp_utils.initialized(), "graph parallelism exchanges features"),
        (distutils.get_world_size() > 1, "several workers share the gradients"),
        (unit.debug_checksums_save_path is not None, "debug_checksums_save_path is given"),
        (stranger is not None, f"there is a {type(stranger).__name__}"),
        (config.activation_checkpointing, "activation_checkpointing is true"),
        (config.long_range is not None, "there are long-range blocks"),
        (config.convolution in ("dense", "eaas"), f"convolution is {config.convolution}"),
        (backbone.regress_config.stress, "stress is trained"),
        *((True, reason) for reason in map(_why_not_loss, unit.tasks) if reason is not None),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def why_no_graphs(model: nn.Module) -> str | None:
    """Why the steps of a model cannot be captured in CUDA graphs; None where they can."""
    weight = next(model.parameters())
    if not weight.is_cuda:
        return f"training runs on {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"weights are {weight.dtype}"
    if resolve_backend(model.backbone.config.kernel_backend, weight.device) != "triton":
        return "kernel_backend is reference"
    return None


def _why_not_loss(task: Task) -> str | None:
    loss = task.loss_fn
    known = isinstance(loss, PerSystemSumLoss) or (type(loss) is DDPMTLoss and loss.reduction in ("mean", "sum"))
    if known and type(loss.loss_fn) in _LOSSES and task.property in ("energy", "forces"):
        return None
    reduction = getattr(loss, "reduction", None)
    return f"the loss of {task.name} is {type(loss).__name__} ({type(loss.loss_fn).__name__}, {reduction})"


class Replays:
    """Losses and gradients of batches, padded and, from CUDA graphs where ``capture`` says so, replayed.

    Args:
        unit: whose model, tasks and precision these are.
        model: without the wrapper of data-parallel training.
        max_graphs: captured sizes that are kept; the least recently used goes first. All share their working memory.
        capture: capture at all; without it padded batches run without graphs.
    """

    def __init__(self, unit: MLIPTrainEvalUnit, model: nn.Module, max_graphs: int, capture: bool) -> None:
        self.unit, self.model, self.max_graphs, self.capture = unit, model, max_graphs, capture
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.device = self.parameters[0].device
        self.gradients: list[Tensor | None] | None = None
        self.refused: str | None = None
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._used: torch.cuda.Event | None = None  # what was prepared for the step before has been read
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._graphs: OrderedDict[Sizes, _Capture] = OrderedDict()
        self._steps: Counter[Sizes] = Counter()
        self._too_large: set[Sizes] = set()
        self._failures = 0

    def __call__(self, batch: AtomicData) -> dict[str, Tensor] | None:
        """Losses of a batch by task, with the gradients of their sum in the parameters; None: it must run eagerly.

        The batch is moved to the device. The losses are overwritten by the next call.
        """
        with self._beside():
            batch = batch.to(self.device)
            given = self._prepare(batch)
        losses = None if given is None else self._run(given)
        if losses is None:
            return None
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return losses

    def finished(self) -> None:
        """Whatever reads what was prepared has been launched; the unit says so of a batch that ran eagerly."""
        if self._side is not None:
            self._used = torch.cuda.current_stream(self.device).record_event()

    @contextlib.contextmanager
    def _beside(self):
        """On a stream that does not wait for the step before, only for its use of what was prepared."""
        if self._side is None:
            yield
            return
        if self._used is not None:
            self._side.wait_event(self._used)
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    @torch.no_grad()
    def _prepare(self, batch: AtomicData) -> dict[str, Tensor] | None:
        """Checks, neighbours and targets of a batch on the device, padded; None where padding does not serve."""
        charge, spin, graph, _ = self.model.backbone.prepare(batch)
        if graph.num_edges == 0 or spatial_order(batch["pos"], batch["batch"], graph) is not None:
            return None
        sizes = padded_sizes(graph.num_nodes, graph.num_edges, charge.numel())
        given = _padded_graph(graph, sizes) | _padded_atoms(batch, charge, spin, sizes)
        offset = graph.offset
        if offset is not None:  # as exact as in the graph, which rounds once
            cells = batch["cell"].double()[batch["batch"][graph.target]]
            given["shift"][: graph.num_edges] = (offset.double().unsqueeze(-1) * cells).sum(1)
        for task in self.unit.tasks:
            target, mask = _target(task, batch)
            rows = sizes.atoms if task.level == "atom" else sizes.systems
            given |= {f"target {task.name}": _rows(target, rows), f"mask {task.name}": _rows(mask, rows)}
        return given

    def _run(self, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
        sizes = Sizes(given["pos"].shape[0], given["source"].shape[0], given["charge"].shape[0])
        if sizes in self._too_large:
            return None
        graph = self._graphs.get(sizes)
        if graph is None and (not self.capture or self._steps[sizes] < STEPS_BEFORE):
            self._steps[sizes] += 1
            try:
                losses = self._compute(given)
            except SeveralRuns as reason:  # launches matter little there
                self._too_large.add(sizes)
                log_once(f"e2former_v2: steps of up to {sizes} run eagerly, their edges take several runs ({reason})")
                return None
            self.finished()
            return losses
        if graph is None:
            graph = self._captured(sizes, given)
            if graph is None:
                return None
        self._graphs.move_to_end(sizes)
        _copy(graph.inputs, given)
        self.finished()
        graph.graph.replay()
        return graph.losses

    def _captured(self, sizes: Sizes, given: dict[str, Tensor]) -> _Capture | None:
        if len(self._graphs) >= self.max_graphs:
            log_once(
                f"e2former_v2: batches have more than {self.max_graphs} sizes (max_graphs), some are captured again"
            )
            torch.cuda.synchronize(self.device)
            self._graphs.popitem(last=False)
        try:
            graph = _Capture(given, self._compute, self._pool)
        except RuntimeError as error:
            self._failures += 1
            self._pool = torch.cuda.graph_pool_handle()  # torch holds the other to be in use
            self.refused = str(error.__context__ or error) if self._failures == MAX_FAILURES else None
            what = "steps are not replayed any more" if self.refused else "this step runs eagerly"
            logging.warning(f"e2former_v2: capturing a training step failed, {what}: {error.__context__ or error}")
            return None
        self._graphs[sizes] = graph
        logging.info("training steps of up to %d atoms and %d edges are replayed from now on", *sizes[:2])
        return graph

    def _compute(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses; writes their gradients. Nothing here looks at a value: it may be captured."""
        unit, backbone = self.unit, self.model.backbone
        # leaves of this stream: autograd would have a capture wait for the stream that the parameters' own are bound to
        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        pos = given["pos"].detach().requires_grad_(not backbone.regress_config.direct_forces)
        graph = _graph(given, pos, backbone.cutoff)
        data = {key: given[key] for key in ("cell", "natoms", "batch", "atomic_numbers")}
        data |= {"pos": pos, "batch_full": data["batch"], "atomic_numbers_full": data["atomic_numbers"]}
        data["prepared"] = given["charge"], given["spin"], graph, None
        with tf32_context_manager(unit.tf32):
            with torch.autocast(self.device.type, enabled=unit.autocast_enabled, dtype=unit.autocast_dtype):
                predictions = functional_call(self.model, dict(zip(self.names, leaves, strict=True)), (data,))
                losses = {task.name: _loss(task, predictions, given) for task in unit.tasks}
            total = sum(losses.values())
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        if self.gradients is None:
            self.gradients = [None if gradient is None else torch.empty_like(gradient) for gradient in gradients]
        pairs = [(mine, g) for mine, g in zip(self.gradients, gradients, strict=True) if g is not None]
        foreach_copy_(*map(list, zip(*pairs, strict=True)))
        return {name: loss.detach() for name, loss in losses.items()}


class _Capture:
    """One size: fixed memory for its batches, and the graph that reads it."""

    def __init__(
        self, given: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], pool: tuple
    ) -> None:
        self.inputs = {key: torch.empty_like(value) for key, value in given.items()}
        _copy(self.inputs, given)
        self.graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # what dies may talk to the GPU, which invalidates a capture
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph does not leave its stream after an error
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self.losses = compute(self.inputs)
                finally:
                    self.graph.capture_end()
        finally:
            if collecting:
                gc.enable()


def _copy(mine: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for dtype in {value.dtype for value in given.values()}:
        keys = [key for key, value in given.items() if value.dtype == dtype]
        foreach_copy_([mine[key] for key in keys], [given[key] for key in keys])


def _rows(values: Tensor, rows: int, value: float = 0) -> Tensor:
    """With more rows, of ``value``."""
    return pad(values, (0, 0) * (values.dim() - 1) + (0, rows - values.shape[0]), value=value)


def _padded_atoms(batch: AtomicData, charge: Tensor, spin: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    atoms, systems = batch["pos"].shape[0], charge.numel()
    natoms = _rows(batch["natoms"].long(), sizes.systems)
    natoms[systems] = sizes.atoms - atoms
    return {
        "pos": _rows(batch["pos"].detach(), sizes.atoms),
        "cell": _rows(batch["cell"].detach(), sizes.systems),
        "atomic_numbers": _rows(batch["atomic_numbers"].long(), sizes.atoms, PADDING_ELEMENT),
        "batch": _rows(batch["batch"].long(), sizes.atoms, systems),
        "natoms": natoms,
        "charge": _rows(charge, sizes.systems),
        "spin": _rows(spin, sizes.systems),
        "systems": torch.full((), systems, dtype=torch.int64, device=charge.device),
    }


def _padded_graph(graph: Graph, sizes: Sizes) -> dict[str, Tensor]:
    """Edge p of the free ones joins padding atom floor(p K / free), of K, to itself, over half the cutoff."""
    nodes, edges, device = graph.num_nodes, graph.num_edges, graph.source.device
    free, padding = sizes.edges - edges, sizes.atoms - nodes
    number = torch.arange(max(sizes.edges, padding + 1), device=device)
    owner = (number[:free] * padding).div(max(free, 1), rounding_mode="floor") + nodes
    last = (number[1 : padding + 1] * free + (padding - 1)).div(padding, rounding_mode="floor") + edges
    shift = torch.zeros(sizes.edges, 3, dtype=torch.float64, device=device)
    shift[edges:, 0] = -0.5 * graph.cutoff
    return {
        "source": torch.cat([graph.source, owner]),
        "target": torch.cat([graph.target, owner]),
        "order": torch.cat([graph.source_order, number[edges : sizes.edges]]),
        "row_ptr": torch.cat([graph.row_ptr, last]),
        "source_ptr": torch.cat([graph.source_ptr, last]),
        "shift": shift,
    }


def _graph(given: Mapping[str, Tensor], pos: Tensor, cutoff: float) -> Graph:
    """The padded graph; vectors are rounded once, as those of `e2former_fairchem.graph.build_graph`."""
    nodes = pos.shape[0]
    senders = Transposed(given["source"], nodes, given["order"], given["source_ptr"])
    graph = Graph(
        given["source"], given["target"], pos, None, None, given["row_ptr"], cutoff, nodes,
        senders=senders, one_run=True,
    )  # fmt: skip
    with torch.autocast(pos.device.type, enabled=False):
        apart = row_differences(pos.double(), graph.target, graph.source, graph.by_target, graph.by_source)
        graph.vec = (apart - given["shift"]).to(pos.dtype)
    return graph


def _target(task: Task, batch: AtomicData) -> tuple[Tensor, Tensor]:
    """What fairchem's `compute_loss` compares a prediction with, and which rows it counts."""
    target = batch[task.name]
    mask = torch.isfinite(target)
    if "forces" in task.name:
        mask = mask.all(dim=1)
    if task.level == "atom" and task.train_on_free_atoms:
        mask = mask & (batch.fixed == 0)
    if task.element_references is not None:
        target = task.element_references.apply_refs(batch, target)
    return task.normalizer.norm(target), mask


def _loss(task: Task, predictions: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, Tensor]) -> Tensor:
    """fairchem's `DDPMTLoss` of the rows that the mask counts, whose number only the device knows."""
    loss, target, mask = task.loss_fn, given[f"target {task.name}"], given[f"mask {task.name}"]
    prediction = predictions[task.name][task.property].view(mask.shape[0], -1)
    target = torch.nan_to_num(target.view(prediction.shape), posinf=0.0, neginf=0.0)
    if prediction.numel() == mask.numel():
        mask = mask.view(prediction.shape)
    value = (loss.loss_fn(prediction, target, given["natoms"].clamp(min=1)) * mask).sum()
    if isinstance(loss, PerSystemSumLoss):
        value = value / given["systems"]
    elif loss.reduction == "mean":
        value = value / mask.sum().clamp(min=1)
    return loss.coefficient * torch.nan_to_num(value, nan=0.0)
