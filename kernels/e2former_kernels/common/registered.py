"""Operations of :mod:`e2former_kernels.common.step` registered with torch.library, for torch.compile.

Outside of torch.compile the operations are autograd functions, which need not say what they do. Registered, one
operation is three: its value, its gradient and its second derivative, each of which names the next as its backward
pass. torch.compile then puts them into its graph as they are. AOTAutograd has no second derivative of a compiled region
(https://github.com/pytorch/pytorch/issues/91469): models that train on forces made by autograd run without
torch.compile; inference and training on energies or direct forces may use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.backend import Mode
from e2former_kernels.common.runs import evaluate
from e2former_kernels.common.step import Step
from e2former_kernels.compat import is_fake, will_engine_execute_node, with_autograd


class Settings(NamedTuple):
    """What an operation takes beside tensors, as torch.library can pass it on (numbers may be symbols in a graph)."""

    integers: Sequence[int] = ()
    numbers: Sequence[float] = ()
    words: str = ""


NO_SETTINGS = Settings()
# (tensors, index, settings, mode) -> the step of which the tensors are the inputs
MakeStep = Callable[[list[Tensor], list[Tensor], Settings, Mode], Step]
# (tensors, index, settings) -> an empty tensor of the value's shape, strides, dtype and device
Shape = Callable[[Sequence[Tensor], Sequence[Tensor], Settings], Tensor]


def flags(tensors: Sequence[Tensor | None]) -> list[int]:
    """Which of the tensors are there: torch.library differentiates no lists with gaps."""
    return [int(t is not None) for t in tensors]


def there(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those of the tensors that are there."""
    return [t for t in tensors if t is not None]


def with_gaps(tensors: Sequence[Tensor], known: Sequence[int]) -> list[Tensor | None]:
    """The list of which :func:`flags` and :func:`there` were taken."""
    rest = iter(tensors)
    return [next(rest) if flag else None for flag in known]


@contextlib.contextmanager
def _body(device: torch.device) -> Iterator[None]:
    """Inside: no graph is made, but recomputation may differentiate what it computes.

    The dispatcher excludes autograd from the bodies of operations, where derivatives would silently be zeros.
    """
    with with_autograd():
        with torch.enable_grad():
            if torch.empty(0, requires_grad=True).neg().grad_fn is None:
                raise RuntimeError("autograd is off inside a registered operation; its derivatives would be zeros")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield


def _own(found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results as torch.library demands and fakes promise: contiguous, in memory of their own, from its start."""
    taken, out = {t.untyped_storage().data_ptr() for t in inputs}, []
    for t in found:
        t = t.contiguous()
        t = t.clone() if t.storage_offset() or t.untyped_storage().data_ptr() in taken else t
        taken.add(t.untyped_storage().data_ptr())
        out.append(t)
    return out


def _wanted(ctx, number: int) -> list[int]:
    """Which of the first ``number`` tensors the pass asks for; while a graph is traced, all that need gradients."""
    nodes = [node for node, _ in ctx.next_functions[:number]]
    tracing = any(is_fake(t) for t in ctx.saved_tensors)

    def runs(node) -> bool:
        leaf = node.name() == "torch::autograd::AccumulateGrad"  # the engine does not answer for leaves
        return tracing or leaf or will_engine_execute_node(node)

    return [n for n, node in enumerate(nodes) if node is not None and runs(node)]


def _placed(found: Sequence[Tensor], at: Sequence[int], number: int) -> list[Tensor | None]:
    out: list[Tensor | None] = [None] * number
    for n, t in zip(at, found, strict=True):
        out[n] = t
    return out


def _nothing(*arguments: Sequence[int] | Sequence[float] | str | bool) -> list[list | None]:
    """Gradients by arguments that are no tensors: torch.library takes an empty list for one of tensors."""
    return [None if a or isinstance(a, str | bool) else [] for a in arguments]


def register(name: str, make: MakeStep, shape: Shape) -> Callable[..., Tensor]:
    """Register the operation ``name`` and its derivatives; returns the function to call under torch.compile.

    That function takes ``tensors``, the inputs of the step, ``index``, all other tensors, ``settings`` and the mode, of
    which bodies see whether weights are trained and the precision. Arguments are checked when bodies run. Nothing is
    kept between value and derivatives. Autocast is off in all of them.
    """

    def step_of(tensors, index, integers, numbers, words, trained, precision) -> Step:
        mode = Mode(trained, True, precision)
        return make(list(tensors), list(index), Settings(integers, numbers, words), mode)

    @torch.library.custom_op(f"e2former_kernels::{name}", mutates_args=())
    def value(
        tensors: Sequence[Tensor],
        index: Sequence[Tensor],
        integers: Sequence[int],
        numbers: Sequence[float],
        words: str,
        trained: bool,
        precision: str,
    ) -> Tensor:
        with _body(tensors[0].device):
            step = step_of(tensors, index, integers, numbers, words, trained, precision)
            return step.forward(list(tensors))

    @torch.library.custom_op(f"e2former_kernels::{name}_gradient", mutates_args=())
    def gradient(
        grad: Tensor,
        tensors: Sequence[Tensor],
        index: Sequence[Tensor],
        integers: Sequence[int],
        numbers: Sequence[float],
        words: str,
        trained: bool,
        precision: str,
        wanted: Sequence[int],
    ) -> list[Tensor]:
        with _body(grad.device):
            step = step_of(tensors, index, integers, numbers, words, trained, precision)
            return _own(step.backward(grad, list(tensors), list(wanted)), [grad, *tensors])

    @torch.library.custom_op(f"e2former_kernels::{name}_second", mutates_args=())
    def second(
        cotangents: Sequence[Tensor],
        grad: Tensor,
        tensors: Sequence[Tensor],
        index: Sequence[Tensor],
        integers: Sequence[int],
        numbers: Sequence[float],
        words: str,
        trained: bool,
        precision: str,
        wanted: Sequence[int],
        present: Sequence[int],
        again: Sequence[int],
    ) -> list[Tensor]:
        with _body(grad.device):
            step, inputs = step_of(tensors, index, integers, numbers, words, trained, precision), list(tensors)
            given = _placed(cotangents, present, len(wanted))
            kernels = getattr(step, "second", None)
            found = None if kernels is None else kernels(given, grad, inputs, list(wanted), list(again))
            if found is None:
                saved = [grad, *inputs]
                given = [torch.zeros_like(inputs[n]) if c is None else c for n, c in zip(wanted, given, strict=True)]
                found = step.plan.vjp(wanted, inputs).vjp(again, saved).run([*given, *saved])
            found = [
                torch.zeros_like([grad, *inputs][n]) if t is None else t for n, t in zip(again, found, strict=True)
            ]
            return _own(found, [*cotangents, grad, *tensors])

    @value.register_fake
    def _(tensors, index, integers, numbers, words, trained, precision):
        return shape(tensors, index, Settings(integers, numbers, words))

    @gradient.register_fake
    def _(grad, tensors, index, integers, numbers, words, trained, precision, wanted):
        return [tensors[n].new_empty(tensors[n].shape) for n in wanted]

    @second.register_fake
    def _(cotangents, grad, tensors, index, integers, numbers, words, trained, precision, wanted, present, again):
        return [t.new_empty(t.shape) for t in ([grad, *tensors][n] for n in again)]

    def keep(ctx, *tensors: Sequence[Tensor]) -> None:
        ctx.counts = [len(t) for t in tensors]
        ctx.save_for_backward(*(t for several in tensors for t in several))

    def kept(ctx) -> list[list[Tensor]]:
        rest = iter(ctx.saved_tensors)
        return [[next(rest) for _ in range(number)] for number in ctx.counts]

    def keep_value(ctx, inputs, output) -> None:
        tensors, index, *ctx.rest = inputs
        keep(ctx, tensors, index)

    def value_backward(ctx, grad: Tensor):
        tensors, index = kept(ctx)
        wanted = _wanted(ctx, len(tensors))
        found = gradient(grad, tensors, index, *ctx.rest, wanted) if wanted else []
        return _placed(found, wanted, len(tensors)), [None] * len(index), *_nothing(*ctx.rest)

    def keep_gradient(ctx, inputs, output) -> None:
        grad, tensors, index, *ctx.rest, ctx.wanted = inputs
        ctx.set_materialize_grads(False)
        keep(ctx, [grad, *tensors], index)

    def gradient_backward(ctx, cotangents: list[Tensor | None]):
        (grad, *tensors), index = kept(ctx)
        again = _wanted(ctx, 1 + len(tensors))
        present = [n for n, c in enumerate(cotangents) if c is not None]
        again = again if present else []
        found = []
        if again:
            given = [cotangents[n] for n in present]
            found = second(given, grad, tensors, index, *ctx.rest, ctx.wanted, present, again)
        by_grad, *by_tensors = _placed(found, again, 1 + len(tensors))
        return by_grad, by_tensors, [None] * len(index), *_nothing(*ctx.rest, ctx.wanted)

    def keep_second(ctx, inputs, output) -> None:
        cotangents, grad, tensors, index, *ctx.rest, ctx.wanted, ctx.present, ctx.again = inputs
        keep(ctx, cotangents, [grad, *tensors], index)

    def second_backward(ctx, grads: list[Tensor]):
        """The third derivative, and with it all further ones: recomputed by autograd functions."""
        cotangents, primals, index = kept(ctx)
        inputs = [*cotangents, *primals]
        if any(is_fake(t) for t in inputs):
            raise NotImplementedError(f"{name}: torch.compile has value, first and second derivative of it, no third")
        third = _wanted(ctx, len(inputs))
        wanted = [ctx.wanted[n] for n in ctx.present]
        with torch.autocast(grads[0].device.type, enabled=False):
            plan = step_of(primals[1:], index, *ctx.rest).plan
            plan = plan.vjp(wanted, primals[1:]).vjp(ctx.again, primals).vjp(third, inputs)
            found = evaluate(plan, *grads, *inputs) if third else []
        out, number = _placed(found, third, len(inputs)), len(cotangents)
        rest = _nothing(*ctx.rest, ctx.wanted, ctx.present, ctx.again)
        return out[:number], out[number], out[number + 1 :], [None] * len(index), *rest

    value.register_autograd(value_backward, setup_context=keep_value)
    gradient.register_autograd(gradient_backward, setup_context=keep_gradient)
    second.register_autograd(second_backward, setup_context=keep_second)

    def call(
        tensors: Sequence[Tensor], mode: Mode, index: Sequence[Tensor] = (), settings: Settings = NO_SETTINGS
    ) -> Tensor:
        integers, numbers, words = settings
        return value(list(tensors), list(index), list(integers), list(numbers), words, mode.trained, mode.precision)

    return call
