"""Operations of :mod:`e2former_kernels.common.call` registered with torch.library, for torch.compile.

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
from e2former_kernels.common.call import Call, Change, evaluate, recomputed_second
from e2former_kernels.compat import is_fake, will_engine_execute_node, with_autograd


class Settings(NamedTuple):
    """What an operation takes beside tensors, as torch.library can pass it on (numbers may be symbols in a graph)."""

    integers: Sequence[int] = ()
    numbers: Sequence[float] = ()
    words: str = ""


NO_SETTINGS = Settings()
# (tensors, index, settings, mode) -> the call of which the tensors are the inputs
MakeCall = Callable[[list[Tensor], list[Tensor], Settings, Mode], Call]
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

    def comes_to(node) -> bool:
        leaf = node.name() == "torch::autograd::AccumulateGrad"  # the engine does not answer for leaves
        return tracing or leaf or will_engine_execute_node(node)

    return [n for n, node in enumerate(nodes) if node is not None and comes_to(node)]


def _placed(found: Sequence[Tensor], at: Sequence[int], number: int) -> list[Tensor | None]:
    by = dict(zip(at, found, strict=True))
    return [by.get(n) for n in range(number)]


def _keep(ctx, inputs: tuple, output: object) -> None:
    """Keep the arguments: lists of tensors as autograd keeps them."""
    ctx.set_materialize_grads(False)
    tensors, ctx.outline = [], []
    for given in inputs:
        some = not isinstance(given, str | bool) and len(given) > 0 and isinstance(given[0], Tensor)
        ctx.outline.append(slice(len(tensors), len(tensors) + len(given)) if some else given)
        tensors += given if some else ()
    ctx.save_for_backward(*tensors)


def _kept(ctx) -> list:
    saved = ctx.saved_tensors
    return [list(saved[given]) if isinstance(given, slice) else given for given in ctx.outline]


def _nothing(arguments: Sequence) -> list[list | None]:
    """No gradients by arguments: torch.library takes a list for one of tensors, which an empty one is."""
    plain = [isinstance(a, str | bool) or (len(a) > 0 and not isinstance(a[0], Tensor)) for a in arguments]
    return [None if p else [None] * len(a) for p, a in zip(plain, arguments, strict=True)]


# Arguments of all: tensors, Settings, and of the mode what bodies see.
_GIVEN = "Tensor[] tensors, Tensor[] index, SymInt[] integers, float[] numbers, str words, bool trained, str precision"


class _Operation:
    """Value, gradient and second derivative; their arguments are those of :data:`_GIVEN` behind what each adds.

    wanted, by: as in :class:`e2former_kernels.common.call.Call`; present: which of ``wanted`` have cotangents.
    """

    def __init__(self, name: str, make: MakeCall, shape: Shape) -> None:
        self.name, self.make, self.shape = name, make, shape
        self.value = self._define("", f"({_GIVEN}) -> Tensor", self._value, self._like_value, self._after_value)
        first = "SymInt[] wanted, Tensor[] grad"
        self.gradient = self._define(
            "_gradient", f"({first}, {_GIVEN}) -> Tensor[]", self._gradient, self._like_gradient, self._after_gradient
        )
        first = "SymInt[] by, SymInt[] present, SymInt[] wanted, Tensor[] cotangents, Tensor[] grad"
        self.second = self._define(
            "_second", f"({first}, {_GIVEN}) -> Tensor[]", self._second, self._like_second, self._after_second
        )

    def _define(self, suffix: str, schema: str, body: Callable, fake: Callable, backward: Callable) -> Callable:
        name = f"e2former_kernels::{self.name}{suffix}"
        operation = torch.library.custom_op(name, body, mutates_args=(), schema=schema)
        operation.register_fake(fake)
        operation.register_autograd(backward, setup_context=_keep)
        return operation

    def _call(self, tensors, index, integers, numbers, words, trained, precision) -> Call:
        """The call of which the tensors are the inputs."""
        mode = Mode(trained, True, precision)
        return self.make(list(tensors), list(index), Settings(integers, numbers, words), mode)

    def _value(self, tensors, *rest) -> Tensor:
        with _body(tensors[0].device):
            return self._call(tensors, *rest).forward(list(tensors))

    def _like_value(self, tensors, index, integers, numbers, words, *_) -> Tensor:
        return self.shape(tensors, index, Settings(integers, numbers, words))

    def _after_value(self, ctx, grad: Tensor):
        tensors, *rest = _kept(ctx)
        wanted = _wanted(ctx, len(tensors))
        found = self.gradient(wanted, [grad], tensors, *rest) if wanted else []
        return _placed(found, wanted, len(tensors)), *_nothing(rest)

    def _gradient(self, wanted, grad, tensors, *rest) -> list[Tensor]:
        with _body(grad[0].device):
            found = self._call(tensors, *rest).backward(grad[0], list(tensors), list(wanted))
            return _own(found, [*grad, *tensors])

    def _like_gradient(self, wanted, grad, tensors, *_) -> list[Tensor]:
        return [tensors[n].new_empty(tensors[n].shape) for n in wanted]

    def _after_gradient(self, ctx, cotangents: list[Tensor | None]):
        wanted, grad, tensors, *rest = _kept(ctx)
        present = [n for n, c in enumerate(cotangents) if c is not None]
        by = _wanted(ctx, 1 + len(tensors)) if present else []
        given = [cotangents[n] for n in present]
        found = self.second(by, present, wanted, given, grad, tensors, *rest) if by else []
        by_grad, *by_tensors = _placed(found, by, 1 + len(tensors))
        return *_nothing([wanted]), [by_grad], by_tensors, *_nothing(rest)

    def _second(self, by, present, wanted, cotangents, grad, tensors, *rest) -> list[Tensor]:
        saved = [*grad, *tensors]
        with _body(saved[0].device):
            call = self._call(tensors, *rest)
            change = Change(_placed(cotangents, present, len(wanted)), grad[0], list(wanted))
            found = call.second(change, saved[1:], list(by))
            if found is None:
                found = recomputed_second(call, change, saved[1:], list(by))
            found = [torch.zeros_like(saved[n]) if t is None else t for n, t in zip(by, found, strict=True)]
            return _own(found, [*cotangents, *saved])

    def _like_second(self, by, present, wanted, cotangents, grad, tensors, *_) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in ([*grad, *tensors][n] for n in by)]

    def _after_second(self, ctx, grads: list[Tensor | None]):
        """The third derivative, and with it all further ones: recomputed by autograd functions."""
        by, present, wanted, cotangents, grad, tensors, *rest = _kept(ctx)
        saved = [*grad, *tensors]
        inputs, used = [*cotangents, *saved], [wanted[n] for n in present]
        if any(is_fake(t) for t in inputs):
            raise NotImplementedError(f"{self.name}: torch.compile has value, first and second derivative, no third")
        third = _wanted(ctx, len(inputs))
        grads = [torch.zeros_like(saved[n]) if g is None else g for n, g in zip(by, grads, strict=True)]
        with torch.autocast(saved[0].device.type, enabled=False):
            plan = self._call(tensors, *rest).plan(tensors).vjp(used, tensors).vjp(by, saved).vjp(third, inputs)
            found = _placed(evaluate(plan, *grads, *inputs) if third else [], third, len(inputs))
        number = len(cotangents)
        by_saved = found[number : number + 1], found[number + 1 :]
        return *_nothing([by, present, wanted]), found[:number], *by_saved, *_nothing(rest)


def register(name: str, make: MakeCall, shape: Shape) -> Callable[..., Tensor]:
    """Register the operation ``name`` and its derivatives; returns the function to call under torch.compile.

    That function takes ``tensors``, the inputs of the call, ``index``, all other tensors, ``settings`` and the mode, of
    which bodies see whether weights are trained and the precision. Arguments are checked when bodies run. Nothing is
    kept between value and derivatives. Autocast is off in all of them.
    """
    value = _Operation(name, make, shape).value

    def call(
        tensors: Sequence[Tensor], mode: Mode, index: Sequence[Tensor] = (), settings: Settings = NO_SETTINGS
    ) -> Tensor:
        integers, numbers, words = settings
        return value(list(tensors), list(index), list(integers), list(numbers), words, mode.trained, mode.precision)

    return call
