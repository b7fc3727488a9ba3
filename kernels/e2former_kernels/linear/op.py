"""Linear maps of groups of rows, without a copy of the rows and without a scatter of the results.

A group is some consecutive rows of a node that share a weight: the 2l+1 rows of a degree (SO3 linear), or the paths
that lead to one output row, side by side. Each group is one batched matrix product that reads and writes strided views.
The map is bilinear; its derivatives are the three functions here with other arguments, so any order exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode, float32_products
from e2former_kernels.common.checks import check_same_device, check_same_dtype, check_shape
from e2former_kernels.common.registered import Settings, register
from e2former_kernels.common.runs import Plan
from e2former_kernels.common.step import node_plan, run_step
from e2former_kernels.common.sums import RunSums, degree_sums
from e2former_kernels.linear.reference import so3_rows


def _views(x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """Views [rows, N, width] of each group of x [N, sum rows * width], contiguous."""
    nodes, total = x.shape
    views, offset = [], x.storage_offset()
    for number, width in zip(rows, widths, strict=True):
        views.append(x.as_strided((number, nodes, width), (width, total, 1), offset))
        offset += number * width
    return views


def apply_groups(x: Tensor, weights: Sequence[Tensor], rows: Sequence[int], transpose: bool, out: Tensor) -> Tensor:
    """out [N, sum rows * O] = rows of x times the group's weight [O, I] (``transpose``: times [O, I] from the left).

    x, out: [N, width], contiguous. No gradient.
    """
    into = [w.shape[1] if transpose else w.shape[0] for w in weights]
    taken = [w.shape[0] if transpose else w.shape[1] for w in weights]
    if out.numel():
        for a, w, y in zip(_views(x, rows, taken), weights, _views(out, rows, into), strict=True):
            torch.bmm(a, (w if transpose else w.t()).expand(a.shape[0], -1, -1), out=y)
    return out


def apply_so3(x: Tensor, weight: Tensor, transpose: bool, out: Tensor) -> Tensor:
    """out[:, row] = weight of the row's degree times x[:, row], in one batched product. No gradient.

    x: [N, (L+1)^2, I], out: [N, (L+1)^2, O], any strides that keep columns together; weight: [L+1, O, I], or of the
    rows as :func:`so3_rows` makes it (``transpose``: x has O columns, out I).
    """
    if out.numel():
        rows = weight if weight.shape[0] == x.shape[1] else so3_rows(weight)
        torch.bmm(x.transpose(0, 1), rows if transpose else rows.transpose(1, 2), out=out.transpose(0, 1))
    return out


def add_so3_outer(sums: RunSums, name: str, grad: Tensor, x: Tensor) -> None:
    """Add the gradient by the weight of :func:`apply_so3` to a sum, still row by row (``degree_sums`` adds rows up).

    grad: [n, M, O]; x: [n, M, I].
    """
    sums.add_product(name, grad.permute(1, 2, 0), x.transpose(0, 1))


def _new(x: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width)


class _Apply(torch.autograd.Function):
    """(x, W) -> y."""

    @staticmethod
    def forward(ctx, rows: tuple[int, ...], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows = rows
        x = x.contiguous()
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *weights)
        width = sum(r * w.shape[0] for r, w in zip(rows, weights, strict=True))
        return apply_groups(x, weights, rows, False, _new(x, width))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x = _Transposed.apply(ctx.rows, grad, *weights) if need[1] else None
        grads = (None,) * len(weights)
        if any(need[2:]):
            grads = _Outer.apply(ctx.rows, [tuple(w.shape) for w in weights], grad, x)
        return (None, grad_x, *grads)


class _Transposed(torch.autograd.Function):
    """(g, W) -> gradient by x."""

    @staticmethod
    def forward(ctx, rows: tuple[int, ...], grad: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows = rows
        grad = grad.contiguous()
        ctx.save_for_backward(grad if any(ctx.needs_input_grad[2:]) else None, *weights)
        width = sum(r * w.shape[1] for r, w in zip(rows, weights, strict=True))
        return apply_groups(grad, weights, rows, True, _new(grad, width))

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        grad, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad
        first = _Apply.apply(ctx.rows, grad_out, *weights) if need[1] else None
        rest = (None,) * len(weights)
        if any(need[2:]):
            rest = _Outer.apply(ctx.rows, [tuple(w.shape) for w in weights], grad, grad_out)
        return (None, first, *rest)


class _Outer(torch.autograd.Function):
    """(g, x) -> gradients by W."""

    @staticmethod
    def forward(ctx, rows: tuple[int, ...], shapes: list[tuple[int, int]], grad: Tensor, x: Tensor):
        ctx.rows = rows
        grad, x = grad.contiguous(), x.contiguous()
        ctx.save_for_backward(grad, x)
        outputs, inputs = _views(grad, rows, [o for o, _ in shapes]), _views(x, rows, [i for _, i in shapes])
        products = [torch.bmm(g.transpose(1, 2), a) for g, a in zip(outputs, inputs, strict=True)]
        return tuple(p[0] if p.shape[0] == 1 else p.sum(0) for p in products)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad, x = ctx.saved_tensors
        need = ctx.needs_input_grad
        return (
            None,
            None,
            _Apply.apply(ctx.rows, x, *grads) if need[2] else None,
            _Transposed.apply(ctx.rows, grad, *grads) if need[3] else None,
        )


class _FirstRowBias(torch.autograd.Function):
    """Adds the bias to the first O numbers of every node, in place."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.width = bias.shape[0]
        y[:, : ctx.width] += bias
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad[:, : ctx.width].sum(0) if ctx.needs_input_grad[1] else None


def _check_weight(name: str, weight: Tensor | None, dims: str, shape: tuple[int, ...], x: Tensor, mode: Mode) -> None:
    """Autocast takes care of dtypes where it is on."""
    if weight is not None:
        check_shape(name, weight, dims, shape)
        check_same_device("x", x, **{name: weight})
        if mode.autocast is None:
            check_same_dtype("x", x, **{name: weight})


def _grouped(x: Tensor, weights: Sequence[Tensor], rows: tuple[int, ...], bias: Tensor | None = None) -> Tensor:
    y = _Apply.apply(rows, x, *weights)
    return y if bias is None else _FirstRowBias.apply(y, bias)


def grouped_linear(
    x: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias: Tensor | None = None, mode: Mode = EXACT
) -> Tensor:
    """y[n] = for every group g and each of its rows, W_g x[n, g, row].

    x: [N, sum_g rows_g * I_g]; weights: W_g [O, I_g]; rows: rows_g; bias: [O], for the first row. Returns
    [N, sum_g rows_g * O]. Differentiable to any order. With ``mode.autocast`` it computes in that dtype, as a linear
    layer under autocast does.
    """
    width = sum(r * w.shape[1] for r, w in zip(rows, weights, strict=True))
    check_shape("x", x, "N, sum of rows times inputs", (x.shape[0], width))
    for n, weight in enumerate(weights):
        _check_weight(f"weights[{n}]", weight, "O, I", (weights[0].shape[0], weight.shape[1]), x, mode)
    _check_weight("bias", bias, "O", (weights[0].shape[0],), x, mode)
    if mode.autocast is not None:
        dtype = mode.autocast
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
        bias = None if bias is None else bias.to(dtype)
    given = [x, *weights] if bias is None else [x, *weights, bias]
    if mode.compiled:
        return _registered_grouped(given, mode, settings=Settings(list(rows)))
    if mode.trained:
        return run_step(_grouped_step(given, tuple(rows)), given)
    return _grouped(x, weights, tuple(rows), bias)


class _So3(torch.autograd.Function):
    """(x, W, b) -> y of :func:`apply_so3`, b added where l = 0, or with ``transpose`` (g, W) -> gradient by x."""

    @staticmethod
    def forward(
        ctx, transpose: bool, around: str, rows: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.transpose, ctx.around, ctx.rows = transpose, around, rows
        x = x.contiguous()
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, weight)
        width = weight.shape[2 if transpose else 1]
        y = apply_so3(x, weight if rows is None else rows, transpose, x.new_empty(*x.shape[:2], width))
        if bias is not None:
            y[:, 0] += bias
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        by_x = _So3.apply(not ctx.transpose, ctx.around, ctx.rows, grad, weight, None) if need[0] else None
        by_weight = None
        if need[1]:
            pair = (x, grad) if ctx.transpose else (grad, x)
            by_weight = _So3Outer.apply(ctx.around, *pair)
        return None, None, None, by_x, by_weight, grad[:, 0].sum(0) if need[2] else None


class _So3Outer(torch.autograd.Function):
    """(g, x) -> gradient by W. around: see :func:`float32_products`."""

    @staticmethod
    def forward(ctx, around: str, grad: Tensor, x: Tensor) -> Tensor:
        ctx.around = around
        ctx.save_for_backward(grad, x)
        with float32_products(around):
            return degree_sums(torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1)))

    @staticmethod
    def backward(ctx, by_weight: Tensor):
        grad, x = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        return (
            None,
            _So3.apply(False, ctx.around, None, x, by_weight, None) if need[0] else None,
            _So3.apply(True, ctx.around, None, grad, by_weight, None) if need[1] else None,
        )


def so3_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    exact_gradient: bool = False,
    rows: Tensor | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    """y[l, m] = W_l x[l, m], plus the bias where l = 0.

    x: [N, (L+1)^2, I]; weight: [L+1, O, I]; bias: [O]. Returns [N, (L+1)^2, O]. Differentiable and under autocast as
    :func:`grouped_linear`. exact_gradient: the gradient by the weight in float32 also where TF32 is allowed. rows:
    :func:`so3_rows` of a weight that needs no gradient, where the caller keeps them.
    """
    degrees, outputs = weight.shape[0], weight.shape[1]
    check_shape("x", x, "N, (lmax+1)^2, I", (x.shape[0], degrees**2, x.shape[-1]))
    _check_weight("weight", weight, "lmax+1, O, I", (degrees, outputs, x.shape[-1]), x, mode)
    _check_weight("bias", bias, "O", (outputs,), x, mode)
    if mode.autocast is not None:
        dtype = mode.autocast
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows = None if rows is None else rows.to(dtype)
    given = [x, weight] if bias is None else [x, weight, bias]
    around = mode.precision if exact_gradient else "highest"
    if mode.compiled:
        return _registered_so3(given, mode, settings=Settings([int(exact_gradient)]))
    if mode.trained:
        return run_step(_so3_step(given, around), given)
    return _So3.apply(False, around, rows, x, weight, bias)


# --- as training and torch.compile have them ---------------------------------------------------------------------


@dataclass(frozen=True)
class _So3Step:
    """(x, W, b) -> y, its gradients and their gradients (``common/step.py``): for weights that are trained."""

    plan: Plan
    around: str
    cache: dict = field(default_factory=dict, compare=False)  # what the passes of a training step share
    linear: ClassVar[bool] = True

    def _apply(self, x: Tensor, weight: Tensor, transpose: bool) -> Tensor:
        if "rows" not in self.cache:
            self.cache["rows"] = so3_rows(weight)
        x, width = x.contiguous(), weight.shape[2 if transpose else 1]
        return apply_so3(x, self.cache["rows"], transpose, x.new_empty(*x.shape[:2], width))

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, weight, *bias = tensors
        y = self._apply(x, weight, False)
        if bias:
            y[:, 0].add_(bias[0])
        return y

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        x, weight, *_ = tensors
        gradients = {
            0: lambda: self._apply(grad, weight, True),
            1: lambda: _So3Outer.apply(self.around, grad, x),
            2: lambda: grad[:, 0].sum(0),
        }
        return [gradients[n]() for n in wanted]

    def second(
        self, cotangents: list[Tensor | None], grad: Tensor, tensors: list[Tensor], wanted: list[int], again: list[int]
    ) -> list[Tensor | None] | None:
        if wanted != [0]:
            return None
        found = {
            0: lambda: self._apply(cotangents[0], tensors[1], False),
            2: lambda: _So3Outer.apply(self.around, grad, cotangents[0]),
        }
        return [found[n]() if n in found else None for n in again]


def _so3_step(tensors: list[Tensor], around: str) -> _So3Step:
    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _So3.apply(False, around, None, x, weight, bias)

    return _So3Step(node_plan(function, tensors[:1], tensors[1:]), around)


@dataclass(frozen=True)
class _GroupedStep:
    """(x, W, b) -> y, its gradients and their gradients (``common/step.py``): for weights that are trained."""

    plan: Plan
    rows: tuple[int, ...]
    linear: ClassVar[bool] = True

    def forward(self, tensors: list[Tensor]) -> Tensor:
        groups = len(self.rows)
        return _grouped(tensors[0], tensors[1 : 1 + groups], self.rows, *tensors[1 + groups :])

    def _by_weights(self, grad: Tensor, x: Tensor, weights: list[Tensor]) -> dict[int, Tensor]:
        """By position among the tensors."""
        return dict(enumerate(_Outer.apply(self.rows, [tuple(w.shape) for w in weights], grad, x), 1))

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        x, groups = tensors[0], len(self.rows)
        weights, found = tensors[1 : 1 + groups], {}
        if 0 in wanted:
            found[0] = _Transposed.apply(self.rows, grad, *weights)
        if any(1 <= n <= groups for n in wanted):
            found |= self._by_weights(grad, x, weights)
        if 1 + groups in wanted:
            found[1 + groups] = grad[:, : weights[0].shape[0]].sum(0)
        return [found[n] for n in wanted]

    def second(
        self, cotangents: list[Tensor | None], grad: Tensor, tensors: list[Tensor], wanted: list[int], again: list[int]
    ) -> list[Tensor | None] | None:
        if wanted != [0]:
            return None
        groups, (change,) = len(self.rows), cotangents
        weights, found = tensors[1 : 1 + groups], {}
        if 0 in again:
            found[0] = _Apply.apply(self.rows, change, *weights)
        if any(2 <= n <= 1 + groups for n in again):
            found |= {1 + n: by for n, by in self._by_weights(grad, change, weights).items()}
        return [found.get(n) for n in again]


def _grouped_step(tensors: list[Tensor], rows: tuple[int, ...]) -> _GroupedStep:
    groups = len(rows)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        return _grouped(x, rest[:groups], rows, *rest[groups:])

    return _GroupedStep(node_plan(function, tensors[:1], tensors[1:]), rows)


def _grouped_shape(tensors: list[Tensor], index: list[Tensor], settings: Settings) -> Tensor:
    x, weight = tensors[:2]
    return x.new_empty(x.shape[0], sum(settings.integers) * weight.shape[0])


_registered_grouped = register(
    "grouped_linear",
    lambda tensors, _, settings, mode: _grouped_step(tensors, tuple(settings.integers)),
    _grouped_shape,
)
_registered_so3 = register(
    "so3_linear",
    lambda tensors, _, settings, mode: _so3_step(tensors, mode.precision if settings.integers[0] else "highest"),
    lambda tensors, *_: tensors[0].new_empty(*tensors[0].shape[:2], tensors[1].shape[1]),
)
