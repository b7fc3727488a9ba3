"""Linear maps of groups of rows, without a copy of the rows and without a scatter of the results.

A group is some consecutive rows of a node that share a weight: the 2l+1 rows of a degree (SO3 linear), or the paths
that lead to one output row, side by side. Each group is one batched matrix product that reads and writes strided views.
The map is bilinear: its derivatives are the same products with other arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode, float32_products
from e2former_kernels.common.call import Change, NodeCall, apply_call
from e2former_kernels.common.checks import check_tensors
from e2former_kernels.common.registered import Settings, register
from e2former_kernels.common.sums import ChunkSums, degree_sums
from e2former_kernels.linear.reference import degree_of_row, grouped_linear_reference, so3_linear_reference


@functools.lru_cache(maxsize=8)
def _degree_of_row(degrees: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return degree_of_row(degrees, device)


def so3_rows(weight: Tensor) -> Tensor:
    """Weights [L+1, O, I] of the degrees as those of the rows, [(L+1)^2, O, I]: for callers with several chunks."""
    return weight.index_select(0, _degree_of_row(weight.shape[0], weight.device))


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


def add_so3_outer(sums: ChunkSums, name: str, grad: Tensor, x: Tensor) -> None:
    """Add the gradient by the weight of :func:`apply_so3` to a sum, still row by row (``degree_sums`` adds rows up).

    grad: [n, M, O]; x: [n, M, I].
    """
    sums.add_product(name, grad.permute(1, 2, 0), x.transpose(0, 1))


@dataclass(frozen=True)
class _Grouped(NodeCall):
    """(x, W_g of every group, perhaps b) -> y, its gradients and their gradients."""

    groups: int
    rows: tuple[int, ...] = ()
    linear: ClassVar[bool] = True

    def reference(self, x: Tensor, *rest: Tensor) -> Tensor:
        return grouped_linear_reference(x, rest[: self.groups], self.rows, *rest[self.groups :])

    def _product(self, x: Tensor, weights: Sequence[Tensor], transpose: bool) -> Tensor:
        """The weights times x; ``transpose``: of what has the shape of y."""
        width = sum(r * w.shape[1 if transpose else 0] for r, w in zip(self.rows, weights, strict=True))
        x = x.contiguous()
        return apply_groups(x, weights, self.rows, transpose, x.new_empty(x.shape[0], width))

    def _by_weights(self, grad: Tensor, x: Tensor, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        grads = _views(grad.contiguous(), self.rows, [w.shape[0] for w in weights])
        inputs = _views(x.contiguous(), self.rows, [w.shape[1] for w in weights])
        products = (torch.bmm(g.transpose(1, 2), a) for g, a in zip(grads, inputs, strict=True))
        return (p[0] if p.shape[0] == 1 else p.sum(0) for p in products)

    def _first_row(self, y: Tensor, outputs: int) -> Tensor:
        """What the bias is added to, [N, O]."""
        return y[:, :outputs]

    def forward(self, tensors: list[Tensor]) -> Tensor:
        y = self._product(tensors[0], tensors[1 : 1 + self.groups], False)
        for bias in tensors[1 + self.groups :]:
            self._first_row(y, bias.shape[0]).add_(bias)
        return y

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        x, weights, found = tensors[0], tensors[1 : 1 + self.groups], {}
        if any(1 <= n <= self.groups for n in wanted):
            found |= enumerate(self._by_weights(grad, x, weights), 1)
        if 0 in wanted:
            found[0] = self._product(grad, weights, True)
        if 1 + self.groups in wanted:
            found[1 + self.groups] = self._first_row(grad, tensors[-1].shape[0]).sum(0)
        return [found[n] for n in wanted]

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        if change.wanted != [0]:
            return None
        weights, (along,), found = tensors[1 : 1 + self.groups], change.cotangents, {}
        if any(2 <= n <= 1 + self.groups for n in by):
            found |= enumerate(self._by_weights(change.grad, along, weights), 2)
        if 0 in by:
            found[0] = self._product(along, weights, False)
        return [found.get(n) for n in by]


@dataclass(frozen=True)
class _So3(_Grouped):
    """The groups are the degrees, with one weight [L+1, O, I], and one batched product has them all.

    around: see :func:`float32_products`, of gradients by W. kept: see ``rows`` of :func:`so3_linear`, for all passes.
    """

    around: str = "highest"
    kept: list[Tensor] = field(default_factory=list, compare=False)

    def reference(self, *tensors: Tensor) -> Tensor:
        return so3_linear_reference(*tensors)

    def _product(self, x: Tensor, weights: Sequence[Tensor], transpose: bool) -> Tensor:
        if not self.kept:
            self.kept.append(so3_rows(weights[0]))
        x, width = x.contiguous(), weights[0].shape[2 if transpose else 1]
        return apply_so3(x, self.kept[0], transpose, x.new_empty(*x.shape[:2], width))

    def _by_weights(self, grad: Tensor, x: Tensor, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        with float32_products(self.around):
            return [degree_sums(torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1)))]

    def _first_row(self, y: Tensor, outputs: int) -> Tensor:
        return y[:, 0]


_registered_grouped = register(
    "grouped_linear",
    lambda tensors, _, settings, mode: _Grouped(len(settings.integers), tuple(settings.integers)),
    lambda tensors, _, settings: tensors[0].new_empty(
        tensors[0].shape[0], sum(settings.integers) * tensors[1].shape[0]
    ),
)
_registered_so3 = register(
    "so3_linear",
    lambda tensors, _, settings, mode: _So3(1, around=mode.precision if settings.integers[0] else "highest"),
    lambda tensors, *_: tensors[0].new_empty(*tensors[0].shape[:2], tensors[1].shape[1]),
)


def grouped_linear(
    x: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias: Tensor | None = None, mode: Mode = EXACT
) -> Tensor:
    """y[n] = for every group g and each of its rows, W_g x[n, g, row].

    x: [N, sum_g rows_g * I_g]; weights: W_g [O, I_g]; rows: rows_g; bias: [O], for the first row. Returns
    [N, sum_g rows_g * O]. Differentiable to any order. With ``mode.autocast`` it computes in that dtype, as a linear
    layer under autocast does.
    """
    outputs, width = weights[0].shape[0], sum(r * w.shape[1] for r, w in zip(rows, weights, strict=True))
    expected = {f"weights[{n}]": (w, "O, I", (outputs, w.shape[1])) for n, w in enumerate(weights)}
    x_shape = x, "N, sum of rows times inputs", (x.shape[0], width)
    check_tensors("x", x, mode.autocast is None, x=x_shape, bias=(bias, "O", (outputs,)), **expected)
    given = [x, *weights] if bias is None else [x, *weights, bias]
    if mode.autocast is not None:
        given = [t.to(mode.autocast) for t in given]
    if mode.compiled:
        return _registered_grouped(given, mode, settings=Settings(list(rows)))
    return apply_call(_Grouped(len(rows), tuple(rows)), given)


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
    degrees, outputs = weight.shape[:2]
    expected = {
        "x": (x, "N, (lmax+1)^2, I", (x.shape[0], degrees**2, x.shape[-1])),
        "weight": (weight, "lmax+1, O, I", (degrees, outputs, x.shape[-1])),
        "bias": (bias, "O", (outputs,)),
    }
    check_tensors("x", x, mode.autocast is None, **expected)
    given = [x, weight] if bias is None else [x, weight, bias]
    if mode.autocast is not None:
        given = [t.to(mode.autocast) for t in given]
    if mode.compiled:
        return _registered_so3(given, mode, settings=Settings([int(exact_gradient)]))
    kept = [] if rows is None else [rows.to(given[1].dtype)]
    return apply_call(_So3(1, around=mode.precision if exact_gradient else "highest", kept=kept), given)
