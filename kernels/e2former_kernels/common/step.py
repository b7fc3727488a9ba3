"""An operation with fused kernels for value, first and, where it has them, second derivative; recomputation beyond."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from e2former_kernels.common.runs import TARGET, WHOLE, Plan, evaluate, plan_of, wanted_inputs
from e2former_kernels.compat import current_graph_task_id, foreach_add_, will_engine_execute_node

Again = tuple[Tensor, Callable[[], Tensor] | None]


@contextlib.contextmanager
def computed_again(*inputs: Again) -> Iterator[None]:
    """Autograd nodes made inside keep no copy of the given tensors: they call for them when they run.

    inputs: pairs of a contiguous tensor and a function that gives the same numbers again, from tensors that are kept
    anyway. None instead of a function: the tensor is kept. The graph that the tensor belongs to is remembered, so
    derivatives of every order are those of the tensor itself.
    """
    makers = [(t.data_ptr(), t.numel(), make) for t, make in inputs if make is not None and t.requires_grad]
    if not makers or not torch.is_grad_enabled():
        yield
        return

    def pack(tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], Sequence[int]]:
        for address, numbers, make in makers:
            if tensor.data_ptr() == address and tensor.numel() == numbers and tensor.is_contiguous():
                return make, tensor.shape
        return tensor

    def unpack(packed: Tensor | tuple[Callable[[], Tensor], Sequence[int]]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, shape = packed
        with torch.no_grad():
            return make().view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


MAX_RUN_NODES = 8192  # nodes worked on at a time by operations on nodes


class NodeRun(NamedTuple):
    """Consecutive nodes."""

    nodes: slice


def node_runs(number: int, size: int = MAX_RUN_NODES) -> list[NodeRun]:
    """All nodes in as few runs of at most ``size`` as there can be, of equal length."""
    runs = max(-(-number // size), 1)
    bounds = [number * n // runs for n in range(runs + 1)]
    return [NodeRun(slice(*pair)) for pair in itertools.pairwise(bounds)]


def node_plan(function: Callable[..., Tensor], nodes: Sequence[Tensor], weights: Sequence[Tensor]) -> Plan:
    """Plan of ``function(*node_tensors, *weights)``, which maps rows of nodes to rows of the same nodes."""
    arguments = [(TARGET, t) for t in nodes] + [(WHOLE, t) for t in weights]
    return plan_of(lambda run, *tensors: function(*tensors), node_runs(nodes[0].shape[0]), arguments)


class Step(Protocol):
    """What :func:`run_step` runs. plan: the same function for :func:`e2former_kernels.common.runs.evaluate`.

    A step may also have ``second(cotangents, grad, tensors, wanted, again)``: its second derivative with fused kernels,
    without a graph. With L = sum over ``wanted`` of <cotangent, gradient of that tensor>, it returns dL by the inputs
    numbered in ``again``, where 0 is ``grad`` and 1 + n is tensor n; None for a cotangent stands for zeros. It returns
    None where its kernels do not cover ``wanted``: then, for steps without it, and for derivatives beyond the second,
    the derivative is recomputed through ``plan``. None among the results stands for zeros; the others are tensors of
    their own, to which more may be added.

    A step with ``second`` may also have ``both(grad, tensors, wanted, change)``: the gradients of <grad, value> and of
    <change.grad, change of the value along change.cotangents>, added up, in one pass instead of those of ``backward``
    and ``second``; and ``leaves(change)``, which says whether ``both`` covers it.

    linear: in the first tensor (false where it is missing): then the gradient by it does not depend on it.
    """

    plan: Plan

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """Value, without a graph."""

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        """Gradients of the tensors numbered in ``wanted``, without a graph."""


class Change(NamedTuple):
    """What a second derivative was asked for: gradients of <grad, change of the value along the cotangents>."""

    cotangents: list[Tensor | None]  # of the gradients by the tensors ``wanted``
    grad: Tensor
    wanted: list[int]


class _Left:
    """What the second derivative leaves to the first derivative of the same operation and backward pass.

    Training on forces takes both, of the same inputs. The first comes later. It does the work of both (``change``), or
    adds its gradients to those of the second in one launch, where the engine would add tensor by tensor.
    """

    def __init__(self) -> None:
        self._gradients: dict[int, Tensor] = {}
        self._change: Change | None = None
        self._of_pass = self._first_of_pass = -1  # the engine's passes that left them, and that took the first

    def wait(self, value) -> bool:
        """Whether the first derivative, of the autograd node ``value``, is still to come in this pass."""
        this = current_graph_task_id()
        return this != -1 and self._first_of_pass != this and will_engine_execute_node(value)

    def leave(self, gradients: dict[int, Tensor]) -> None:
        """Leave gradients by the position of the input; their memory is used up."""
        self._enter()
        self._gradients = self.add(gradients)

    def leave_change(self, change: Change) -> bool:
        """Leave all of a second derivative but its gradient by ``change.grad``; False where one is there already."""
        self._enter()
        if self._change is not None:
            return False
        self._change = change
        return True

    def take(self) -> Change | None:
        """Begin the first derivative."""
        self._enter()
        self._first_of_pass = self._of_pass
        change, self._change = self._change, None
        return change

    def _enter(self) -> None:
        this = current_graph_task_id()
        if self._of_pass != this:  # what a pass that failed has left is gone
            self._gradients, self._change, self._of_pass = {}, None, this

    def add(self, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sums of these gradients and those that were left, which are forgotten."""
        left, self._gradients = self._gradients, {}
        both = [n for n in left if n in gradients]
        if both:
            foreach_add_([left[n] for n in both], [gradients[n] for n in both])
        return gradients | left


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Kernels take the dtypes that they are given, whatever is on when autograd comes to a derivative."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: Step, *tensors: Tensor) -> Tensor:
        ctx.step, ctx.left = step, _Left()
        ctx.save_for_backward(*tensors)
        with _no_autocast(tensors[0].device):
            return step.forward(list(tensors))

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        wanted = wanted_inputs(ctx, 1)
        if torch.is_grad_enabled():
            if wanted == [0] and getattr(ctx.step, "linear", False):
                tensors = (tensors[0].detach(), *tensors[1:])
            found = _Gradient.apply(ctx.step, wanted, ctx, grad, *tensors) if wanted else ()
            return _placed(dict(zip(wanted, found, strict=True)), 1, len(tensors))
        change, found = ctx.left.take(), []
        if wanted:
            with _no_autocast(grad.device):
                if change is None:
                    found = ctx.step.backward(grad, list(tensors), wanted)
                else:
                    found = ctx.step.both(grad, list(tensors), wanted, change)
        return _placed(ctx.left.add(dict(zip(wanted, found, strict=True))), 1, len(tensors))


def _placed(found: dict[int, Tensor], first: int, number: int) -> tuple[Tensor | None, ...]:
    """Gradients by position of the ``number`` tensors that follow ``first`` other inputs, as autograd takes them."""
    return (None,) * first + tuple(found.get(n) for n in range(number))


class _Gradient(torch.autograd.Function):
    """The first derivative; its own derivatives are recomputed run by run."""

    @staticmethod
    def forward(ctx, step: Step, wanted: list[int], value, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.wanted, ctx.value = step, wanted, value
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *tensors)
        with _no_autocast(grad.device):
            return tuple(step.backward(grad, list(tensors), wanted))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None):
        saved = ctx.saved_tensors
        again = wanted_inputs(ctx, 3)
        if not again or all(c is None for c in cotangents):
            return (None,) * (3 + len(saved))
        found = None
        if hasattr(ctx.step, "second") and not torch.is_grad_enabled():
            with _no_autocast(saved[0].device):
                found = _Gradient.second(ctx, list(cotangents), saved, again)
        if found is None:
            plan = ctx.step.plan.vjp(ctx.wanted, saved[1:]).vjp(again, saved)
            given = [
                torch.zeros_like(saved[1 + n]) if c is None else c for n, c in zip(ctx.wanted, cotangents, strict=True)
            ]
            with _no_autocast(saved[0].device):
                found = evaluate(plan, *given, *saved)
            return _placed(dict(zip(again, found, strict=True)), 3, len(saved))
        return _placed(found, 3, len(saved))

    @staticmethod
    def second(
        ctx, cotangents: list[Tensor | None], saved: tuple[Tensor, ...], again: list[int]
    ) -> dict[int, Tensor] | None:
        """What ``Step.second`` returns, by position, less what is left to the first derivative."""
        step, left, (grad, *tensors) = ctx.step, ctx.value.left, saved
        later = [n for n in again if n] if left.wait(ctx.value) else []
        if later and hasattr(step, "both"):
            change = Change(cotangents, grad, ctx.wanted)
            if step.leaves(change) and left.leave_change(change):
                again, later = [n for n in again if not n], []
        found = step.second(cotangents, grad, tensors, ctx.wanted, again) if again else []
        if found is None:
            return None
        found = {n: g for n, g in zip(again, found, strict=True) if g is not None}
        if later:
            left.leave({n - 1: found.pop(n) for n in later if n in found})
        return found


def run_step(step: Step, tensors: list[Tensor]) -> Tensor:
    """Value of ``step`` at ``tensors``, differentiable to any order in each of them."""
    return _Value.apply(step, *tensors)
