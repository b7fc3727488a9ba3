"""Training steps from CUDA graphs: forward, forces, losses and all gradients in one launch, the update in another.

A small step is bound by the host, which launches a thousand kernels that take microseconds each. A CUDA graph replays
them on fixed memory, so a batch is padded to one of few sizes (`e2former_fairchem.training.padding`). The size depends
on the batch alone, and so do the numbers: a size that comes up for the first times runs padded without a graph, which
gives the bits that its replays give.

With several workers each replays its own graph; losses are divided by what all of them count, and gradients are summed
once, between the two graphs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from fairchem.core.common import distutils, gp_utils
from fairchem.core.modules.loss import DDPMTLoss, L2NormLoss, MAELoss, MSELoss, PerAtomMAELoss
from fairchem.core.units.mlip_unit.mlip_unit import Task, TrainStrategy
from fairchem.core.units.mlip_unit.utils import tf32_context_manager
from torch import Tensor, nn
from torch.func import functional_call

from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.execution import takes_kernels
from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.training.padding import PaddedBatch, Sizes, counted, padded_graph
from e2former_fairchem.training.properties import PROPERTIES
from e2former_fairchem.validation import log_once
from e2former_kernels.common.chunks import SeveralChunks
from e2former_kernels.compat import foreach_copy_

if TYPE_CHECKING:
    from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit

__all__ = ["Captures", "Replays", "Update", "why_eager", "why_no_graphs"]

#: Steps of a size without a graph before it is captured, which takes as long as a few of them; updates likewise.
STEPS_BEFORE = 2
#: Captures that may fail before no more is tried.
MAX_FAILURES = 3
#: Losses by task of the tensors of a padded batch, on the device.
Compute = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_CAPTURABLE = (torch.optim.Adam, torch.optim.AdamW)
_LOSSES = (L2NormLoss, MAELoss, MSELoss, PerAtomMAELoss)


def why_eager(unit: MLIPTrainEvalUnit, model: nn.Module) -> str | None:
    """Why no step of a unit that trains ``model`` can be padded; None where it can."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, E2FormerV2Backbone):
        return f"the backbone is {type(backbone).__name__}"
    config = backbone.config
    heads = model.output_heads.values()
    uncapturable = next((head for head in heads if not getattr(head, "capturable", False)), None)
    reasons = [
        (unit.train_strategy != TrainStrategy.DDP, f"train_strategy is {unit.train_strategy}"),
        (gp_utils.initialized(), "graph parallelism exchanges features"),
        (unit.debug_checksums_save_path is not None, "debug_checksums_save_path is given"),
        (uncapturable is not None, f"there is a {type(uncapturable).__name__}"),
        (not backbone.otf_graph, "otf_graph is false"),
        (config.activation_checkpointing, "activation_checkpointing is true"),
        (config.long_range is not None, "there are long-range blocks"),
        (config.convolution in ("dense", "eaas"), f"convolution is {config.convolution}"),
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
    if not takes_kernels(model.backbone.config, weight):
        return "kernels do not compute it"
    return None


def _why_not_loss(task: Task) -> str | None:
    loss = task.loss_fn
    known = isinstance(loss, PerSystemSumLoss) or (type(loss) is DDPMTLoss and loss.reduction in ("mean", "sum"))
    if known and type(loss.loss_fn) in _LOSSES and task.property in PROPERTIES and PROPERTIES[task.property].replayed:
        return None
    reduction = getattr(loss, "reduction", None)
    return f"the loss of {task.name} is {type(loss).__name__} ({type(loss.loss_fn).__name__}, {reduction})"


class Replays:
    """Losses and gradients of padded batches, from CUDA graphs where ``capture`` says so.

    Args:
        unit: whose model, tasks and precision these are.
        model: without the wrapper of data-parallel training.
        max_graphs: captured sizes that are kept; the least recently used goes first. All share their working memory.
        capture: makes the graph of a size, from its first batch, the device and what is to be computed; None: padded
            batches run without graphs.
    """

    def __init__(
        self,
        unit: MLIPTrainEvalUnit,
        model: nn.Module,
        max_graphs: int,
        capture: Callable[[PaddedBatch, torch.device, Compute], _Capture] | None,
    ) -> None:
        self.unit, self.model, self.max_graphs, self.capture = unit, model, max_graphs, capture
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.device = self.parameters[0].device
        self.gradients: list[Tensor | None] | None = None
        self.refused: str | None = None
        self.workers = distutils.get_world_size()
        self._all_gradients: Tensor | None = None
        self._graphs: OrderedDict[Sizes, _Capture] = OrderedDict()
        self._steps: Counter[Sizes] = Counter()
        self._several_chunks: set[Sizes] = set()
        self._failures = 0

    def __call__(self, batch: PaddedBatch) -> dict[str, Tensor]:
        """Losses of a batch by task, with the gradients of their sum in the parameters.

        The losses are overwritten by the next call.
        """
        graph = self._graph(batch)
        if graph is None:
            given = batch.tensors(batch.memory.to(self.device, non_blocking=True))
            self._sum(given["counts"])
            losses = self._eager(batch, given)
        else:
            graph.memory.copy_(batch.memory, non_blocking=True)
            self._sum(graph.given["counts"])
            graph.graph.replay()
            losses = graph.losses
        self._sum(self._all_gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return losses

    def _sum(self, values: Tensor) -> None:
        if self.workers > 1:
            dist.all_reduce(values)

    def _eager(self, batch: PaddedBatch, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes = batch.sizes
        if batch.captured and sizes not in self._several_chunks:
            self._steps[sizes] += 1
            try:
                return self._compute(given)
            except SeveralChunks as reason:  # launches matter little there
                self._several_chunks.add(sizes)
                log_once(f"e2former_v2: steps of up to {sizes} run eagerly, their edges take several chunks ({reason})")
        return self._compute(given, one_chunk=False)

    def _graph(self, batch: PaddedBatch) -> _Capture | None:
        sizes = batch.sizes
        graph = self._graphs.get(sizes)
        if graph is not None:
            self._graphs.move_to_end(sizes)
            return graph
        wanted = self.capture and self.refused is None and batch.captured and sizes not in self._several_chunks
        if not wanted or self._steps[sizes] < STEPS_BEFORE:
            return None
        if len(self._graphs) >= self.max_graphs:
            log_once(
                f"e2former_v2: batches have more than {self.max_graphs} sizes (max_graphs), some are captured again"
            )
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._graphs.popitem(last=False)
        try:
            graph = self.capture(batch, self.device, self._compute)
        except RuntimeError as error:
            self._failures += 1
            self.refused = str(error.__context__ or error) if self._failures == MAX_FAILURES else None
            what = "steps are not replayed any more" if self.refused else "this step runs eagerly"
            logging.warning(f"e2former_v2: capturing a training step failed, {what}: {error.__context__ or error}")
            return None
        self._graphs[sizes] = graph
        logging.info("training steps of up to %d atoms and %d edges are replayed from now on", *sizes[:2])
        return graph

    def _compute(self, given: Mapping[str, Tensor], one_chunk: bool = True) -> dict[str, Tensor]:
        """Losses; writes their gradients. Nothing here looks at a value: with ``one_chunk`` it may be captured."""
        unit, backbone = self.unit, self.model.backbone
        regress = backbone.regress_config
        # leaves of this stream: autograd would have a capture wait for the stream that the parameters' own are bound to
        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        pos = given["pos"].detach().requires_grad_(not regress.direct_forces)
        cell = given["cell"].detach().requires_grad_(regress.stress)
        graph = padded_graph(given, pos, cell, backbone.cutoff, one_chunk)
        data = {key: given[key] for key in ("natoms", "batch", "atomic_numbers", "pbc") if key in given}
        data |= {"batch_full": data["batch"], "atomic_numbers_full": data["atomic_numbers"], "pos": pos, "cell": cell}
        data["prepared"] = given["charge"], given["spin"], graph, None
        counts, elements = counted(given["counts"], unit.tasks)
        backbone.record_elements(elements)
        with tf32_context_manager(unit.tf32):
            with torch.autocast(self.device.type, enabled=unit.autocast_enabled, dtype=unit.autocast_dtype):
                predictions = functional_call(self.model, dict(zip(self.names, leaves, strict=True)), (data,))
                losses = {
                    task.name: self._loss(task, predictions, given, count)
                    for task, count in zip(unit.tasks, counts, strict=True)
                }
            gradients = torch.autograd.grad(sum(losses.values()) / self.workers, leaves, allow_unused=True)
        if self.gradients is None:
            self._make_room(gradients)
        pairs = [(mine, g) for mine, g in zip(self.gradients, gradients, strict=True) if g is not None]
        # not one by one: 150 copies of a microsecond are felt in a step of 4 ms, replayed too
        foreach_copy_(*map(list, zip(*pairs, strict=True)))
        return {name: loss.detach() for name, loss in losses.items()}

    def _loss(
        self, task: Task, predictions: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, Tensor], count: Tensor
    ) -> Tensor:
        """fairchem's loss of the rows that the mask counts, whose number only the device knows."""
        loss, target, mask = task.loss_fn, given[f"target {task.name}"], given[f"mask {task.name}"]
        prediction = predictions[task.name][task.property].view(target.shape)
        values = loss.loss_fn(prediction, target, given["natoms"].clamp(min=1)).view(mask.shape[0], -1)
        value = (values * mask.unsqueeze(1)).sum()
        if isinstance(loss, PerSystemSumLoss):
            value = value * self.workers / count
        elif loss.reduction == "mean":
            value = value * self.workers / (count * values.shape[1]).clamp(min=1)
        return loss.coefficient * torch.nan_to_num(value, nan=0.0)

    def _make_room(self, gradients: list[Tensor | None]) -> None:
        """One block for all gradients, each from a multiple of 256 bytes on, so that workers sum them in one go."""
        ends = [0]
        for gradient in gradients:
            ends.append(ends[-1] + (0 if gradient is None else -(-gradient.numel() // 64) * 64))
        self._all_gradients = self.parameters[0].new_zeros(ends[-1])
        self.gradients = [
            None if gradient is None else self._all_gradients[first : first + gradient.numel()].view(gradient.shape)
            for gradient, first in zip(gradients, ends, strict=False)
        ]


class Captures:
    """Makes captures that share their working memory; the log has what each one took.

    Attributes:
        bytes: of the GPU's memory that captures have taken beside what steps without graphs take.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    def __call__(self, batch: PaddedBatch, device: torch.device, compute: Compute) -> _Capture:
        """Capture a size; raises RuntimeError where that fails."""
        torch.cuda.empty_cache()
        begin, before = time.perf_counter(), torch.cuda.memory_reserved(device)
        try:
            capture = _Capture(batch, device, compute, self._pool)
        except RuntimeError:
            self._pool = torch.cuda.graph_pool_handle()  # torch holds the other to be in use
            raise
        self.bytes += torch.cuda.memory_reserved(device) - before
        taken = time.perf_counter() - begin, self.bytes / 2**20
        logging.info("training steps of a size captured in %.1f s; with those before it holds %.0f MiB", *taken)
        return capture


class _Capture:
    """One size: fixed memory for its batches, and the graph that reads it."""

    def __init__(self, batch: PaddedBatch, device: torch.device, compute: Compute, pool: tuple) -> None:
        self.memory = batch.memory.to(device)
        self.given = batch.tensors(self.memory)
        self.graph, self.losses = _captured(lambda: compute(self.given), pool)


def _captured(compute: Callable[[], Any], pool: tuple | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of what ``compute`` launches, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # what dies may talk to the GPU, which invalidates a capture
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph does not leave its stream after an error
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                found = compute()
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    return graph, found


class Update:
    """Clipping, optimiser and average of a step, from a CUDA graph where ``capture`` says so.

    The optimiser's state is what it would be without. The learning rate is read in every step, all other settings are
    those of the first steps. Captured or not, Adam's arithmetic is that of ``capturable``, so that both give the same
    bits.

    Args:
        unit: whose optimiser and average these are.
        capture: capture at all.
    """

    def __init__(self, unit: MLIPTrainEvalUnit, capture: bool) -> None:
        self.unit = unit
        self.refused = _why_no_update(unit) if capture else "capture is off"
        device = next(unit.model.parameters()).device
        self._rates: list[Tensor] = []
        if device.type == "cuda" and type(unit.optimizer) in _CAPTURABLE:
            self._rates = [torch.tensor(group["lr"], device=device) for group in unit.optimizer.param_groups]
            for state in unit.optimizer.state.values():
                state["step"] = state["step"].to(device)
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._norm: Tensor | None = None

    def __call__(self) -> None:
        """Update weights and average by the gradients in the parameters; sets the unit's ``last_grad_norm``."""
        for rate, group in zip(self._rates, self.unit.optimizer.param_groups, strict=False):
            rate.fill_(group["lr"])
        if self._graph is None and self.refused is None and self._steps >= STEPS_BEFORE:
            self._capture()
        if self._graph is None:
            with self._capturable():
                self._norm = self._compute()
        else:
            self._graph.replay()
        average = self.unit.ema_model
        if average is not None and not self._plain_average:
            average.n_averaged += 1
        self._steps += 1
        self.unit.last_grad_norm = self._norm

    @property
    def _plain_average(self) -> bool:
        """Whether `AveragedModel` averages itself: the first time it copies."""
        return self._steps == 0 or self.unit.ema_model.multi_avg_fn is None

    def _compute(self) -> Tensor | None:
        unit, norm = self.unit, None
        if unit.clip_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(unit.model.parameters(), max_norm=unit.clip_grad_norm).detach()
        unit.optimizer.step()
        if unit.ema_model is not None:
            if self._plain_average:
                unit.ema_model.update_parameters(unit.model)
            else:
                self._average(unit.ema_model)
        return norm

    @torch.no_grad()
    def _average(self, average: torch.optim.swa_utils.AveragedModel) -> None:
        """`AveragedModel.update_parameters` without its questions and its count."""
        model = self.unit.model
        average.multi_avg_fn(list(average.parameters()), list(model.parameters()), average.n_averaged)
        for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """With learning rates in memory of the device, and the optimiser's settings as they were afterwards."""
        groups = self.unit.optimizer.param_groups
        kept = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=False):
                group.update(lr=rate, capturable=True)
            yield
        finally:
            for group, settings in zip(groups, kept, strict=True):
                group.update(settings)

    def _capture(self) -> None:
        try:
            with self._capturable():
                self._graph, self._norm = _captured(self._compute)
        except RuntimeError as error:
            self.refused = str(error.__context__ or error)
            logging.warning(f"e2former_v2: capturing the update failed, it runs eagerly: {self.refused}")


def _why_no_update(unit: MLIPTrainEvalUnit) -> str | None:
    """Why the update of a unit cannot be captured; None where it can."""
    average = unit.ema_model
    if type(unit.optimizer) not in _CAPTURABLE:
        return f"the optimiser is {type(unit.optimizer).__name__}"
    if average is not None and (average.multi_avg_fn is None or average.use_buffers):
        return "the average is not fairchem's"
    return None
