"""An operation with fused kernels for value, first and, where it has them, second derivative; recomputation beyond."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.chunks import TARGET, WHOLE, Plan, node_chunks, plan_of
from e2former_kernels.compat import will_engine_execute_node


@contextlib.contextmanager
def recomputed(tensor: Tensor, make: Callable[[], Tensor] | None) -> Iterator[None]:
    """Autograd nodes made inside keep no copy of the tensor: they call ``make`` when they run.

    tensor: contiguous. make: gives the same numbers, from tensors that are kept anyway; None: the tensor is kept.
    The graph that the tensor belongs to is remembered, so derivatives of every order are those of the tensor itself.
    """
    if make is None or not tensor.requires_grad or not torch.is_grad_enabled():
        yield
        return
    address, numbers = tensor.data_ptr(), tensor.numel()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        same = kept.data_ptr() == address and kept.numel() == numbers and kept.is_contiguous()
        return kept.shape if same else kept

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Change(NamedTuple):
    """What a second derivative was asked for: gradients of <grad, change of the value along the cotangents>.

    cotangents: of the gradients by the tensors ``wanted``; None stands for zeros.
    """

    cotangents: list[Tensor | None]
    grad: Tensor
    wanted: list[int]

    def along(self) -> dict[int, Tensor | None]:
        """The cotangents by the position of their tensor."""
        return dict(zip(self.wanted, self.cotangents, strict=True))


class Call:
    """What :func:`apply_call` runs.

    linear: in the first tensor: then the gradient by it does not depend on it.
    """

    linear: ClassVar[bool] = False

    def plan(self, tensors: Sequence[Tensor]) -> Plan:
        """The same function for :func:`evaluate`: derivatives for which there are no kernels are recomputed."""
        raise NotImplementedError

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """Value, without a graph."""
        raise NotImplementedError

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        """Gradients of the tensors numbered in ``wanted``, without a graph."""
        raise NotImplementedError

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        """The second derivative with fused kernels, without a graph; None where they do not cover ``change.wanted``.

        With L = sum over ``wanted`` of <cotangent, gradient of that tensor>, dL by the inputs numbered in ``by``, where
        0 is ``grad`` and 1 + n is tensor n. None among the results stands for zeros.
        """
        return None


class NodeCall(Call):
    """An operation on rows of nodes.

    nodes: how many of the tensors are rows of nodes, the first ones.
    """

    nodes: int = 1

    def reference(self, *tensors: Tensor) -> Tensor:
        """The operation in plain PyTorch."""
        raise NotImplementedError

    def plan(self, tensors: Sequence[Tensor]) -> Plan:
        """The reference on chunks of nodes."""
        arguments = [(TARGET if n < self.nodes else WHOLE, t) for n, t in enumerate(tensors)]
        return plan_of(lambda chunk, *given: self.reference(*given), node_chunks(tensors[0].shape[0]), arguments)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Kernels take the dtypes that they are given, whatever is on when autograd comes to a derivative."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def wanted_inputs(ctx, first: int) -> list[int]:
    """Which inputs of an autograd function, counted from the ``first`` (all tensors), the pass asks for.

    ``needs_input_grad`` only knows which inputs require gradients: while forces are taken with ``autograd.grad(energy,
    positions)`` it is true for every weight. The engine knows better.
    """
    inputs = zip(ctx.needs_input_grad[first:], ctx.next_functions, strict=True)
    return [n for n, (needed, (node, _)) in enumerate(inputs) if needed and node is not None and _comes_to(node)]


def _comes_to(node) -> bool:
    """Whether the pass comes to an autograd node."""
    try:
        return will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient the pass itself was asked for
        return True


def _placed(found: dict[int, Tensor], first: int, number: int) -> tuple[Tensor | None, ...]:
    """Gradients by position of the ``number`` tensors that follow ``first`` other inputs, as autograd takes them."""
    return (None,) * first + tuple(found.get(n) for n in range(number))


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *tensors: Tensor) -> Tensor:
        ctx.call, (first, *rest) = call, tensors
        if call.linear and not any(ctx.needs_input_grad[2:]):  # its shape is all that derivatives ask for
            first = first.new_empty(()).expand(first.shape)
        ctx.save_for_backward(first, *rest)
        with _no_autocast(first.device):
            return call.forward(list(tensors))

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = ctx.saved_tensors
        wanted = wanted_inputs(ctx, 1)
        if torch.is_grad_enabled():
            if wanted == [0] and ctx.call.linear:
                tensors = (tensors[0].detach(), *tensors[1:])
            found = _Gradient.apply(ctx.call, wanted, grad, *tensors) if wanted else ()
        else:
            with _no_autocast(grad.device):
                found = ctx.call.backward(grad, list(tensors), wanted) if wanted else ()
        return _placed(dict(zip(wanted, found, strict=True)), 1, len(tensors))


class _Gradient(torch.autograd.Function):
    """The first derivative."""

    @staticmethod
    def forward(ctx, call: Call, wanted: list[int], grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.wanted = call, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *tensors)
        with _no_autocast(grad.device):
            return tuple(call.backward(grad, list(tensors), wanted))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None):
        grad, *tensors = ctx.saved_tensors
        by = wanted_inputs(ctx, 2)
        if not by or all(c is None for c in cotangents):
            return (None,) * (3 + len(tensors))
        change = Change(list(cotangents), grad, ctx.wanted)
        with _no_autocast(grad.device):
            found = None if torch.is_grad_enabled() else ctx.call.second(change, tensors, by)
            if found is None:
                found = recomputed_second(ctx.call, change, tensors, by)
        return _placed(dict(zip(by, found, strict=True)), 2, 1 + len(tensors))


def recomputed_second(call: Call, change: Change, tensors: list[Tensor], by: list[int]) -> Sequence[Tensor]:
    """The second derivative as ``Call.second`` has it, from the plan; differentiable."""
    saved = change.grad, *tensors
    plan = call.plan(tensors).vjp(change.wanted, tensors).vjp(by, saved)
    given = [torch.zeros_like(tensors[n]) if c is None else c for n, c in change.along().items()]
    return evaluate(plan, *given, *saved)


@torch.compiler.disable()
def apply_call(
    call: Call, tensors: list[Tensor], one: Tensor | None = None, recompute: Callable[[], Tensor] | None = None
) -> Tensor:
    """Value of ``call`` at ``tensors``, differentiable to any order in each of them.

    recompute: gives ``one`` of them once more, see :func:`recomputed`; without it, it is kept.
    """
    if recompute is None:
        return _Value.apply(call, *tensors)
    with recomputed(one, recompute):
        return _Value.apply(call, *tensors)


def evaluate(plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Results of a plan, differentiable to any order: a derivative evaluates the plan of the derivative."""
    return _evaluated_on(tensors[0].device.type).apply(plan, *tensors)


@functools.cache
def _evaluated_on(device_type: str) -> type[torch.autograd.Function]:
    """The autograd function of :func:`evaluate`, whose derivatives run under the autocast of their value."""

    class Evaluated(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=device_type)
        def forward(ctx, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.plan = plan
            ctx.save_for_backward(*tensors)
            return plan.values(tensors)

        @staticmethod
        @torch.amp.custom_bwd(device_type=device_type)
        def backward(ctx, *grads: Tensor):
            tensors = ctx.saved_tensors
            wanted = wanted_inputs(ctx, 1)
            found = evaluate(ctx.plan.vjp(wanted, tensors), *grads, *tensors) if wanted else ()
            return _placed(dict(zip(wanted, found, strict=True)), 1, len(tensors))

    return Evaluated
