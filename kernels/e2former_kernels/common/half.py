r"""float16 with a scale, where products may be rounded to TF32: the same 10 bits of mantissa, half the bytes.

TF32 rounds factors of products to 10 bits and keeps float32's range. float16 has a small one, so rows are divided by
their largest number (docs/network.md, section 13.3): what is below :math:`2^{-14}` of that loses bits, at most
:math:`2^{-25}` of it, less than a float32 sum over the row rounds. Sums are taken in float32.

The format is :data:`FORMAT` and the helpers below: kernels load numbers of rows, and of their products, with
:func:`load_numbers` (or, where rows may be float32 too, as what they point to) and store with :func:`store_numbers`.
Those that do take ``HALF`` or are called ``half_...``, in ``layer_norm/kernels.py``, ``query_key/kernels.py``,
``feedforward/kernels.py``, ``equivariant_attention/kernels_value.py`` and ``equivariant_attention/kernels_reverse.py``.
The ``half.py`` beside them, ``layer_norm/op.py`` and ``fused.py`` launch them; ``linear/op.py`` multiplies rows, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.tiles import next_power


class Rows(NamedTuple):
    """Rows of numbers, and each row's factor where they are float16."""

    numbers: Tensor
    factor: Tensor | None


FORMAT = torch.float16  # of the numbers of a row


@triton.jit
def load_numbers(at, inside):
    """Numbers of a row, or of products of rows, without their factor, in float32."""
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_numbers(at, y, inside):
    """Numbers of a row, of at most 1."""
    tl.store(at, y.to(at.dtype.element_ty), mask=inside)


@triton.jit
def factor_of(top):
    """The factor of a row whose largest number is ``top``."""
    return tl.where(top > 0.0, top, 1.0)


@triton.jit
def store_half(y, out, at, inside, factor):
    """Numbers y of a node as float16 of at most 1 to out[at], and what they are multiplied by to ``factor``."""
    top = factor_of(tl.max(tl.abs(y)))
    store_numbers(out + at, y / top, inside)
    tl.store(factor, top)


@triton.jit
def _half_rows_kernel(x, out, scale, N, stride, group_stride, NUMBERS: tl.constexpr, BLOCK: tl.constexpr):
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + group * group_stride + n * stride + c, mask=c < NUMBERS, other=0.0)
    row = group * N + n
    store_half(v, out, row * NUMBERS + c, c < NUMBERS, scale + row)


def _launch_rows(x: Tensor, out: Tensor, scale: Tensor, nodes: int, strides: tuple[int, int]) -> None:
    if x.numel():
        numbers = x.numel() // scale.numel()
        block = next_power(numbers)
        grid = nodes, scale.numel() // nodes
        warps = 8 if block > 2048 else 4
        _half_rows_kernel[grid](x, out, scale, nodes, *strides, NUMBERS=numbers, BLOCK=block, num_warps=warps)


def new_rows(like: Tensor, *shape: int, leading: int = 1) -> Rows:
    """Uninitialised rows on the device of ``like`` (float32), a factor for each index of the leading dimensions."""
    return Rows(torch.empty(shape, dtype=FORMAT, device=like.device), like.new_empty(shape[:leading]))


def half_rows(x: Tensor, out: Rows | None = None) -> Rows:
    """x [N, ...] as float16 numbers of at most 1, and each row's factor [N], float32. x: float32, contiguous.

    out: where to, contiguous.
    """
    out, scale = new_rows(x, *x.shape) if out is None else out
    _launch_rows(x, out, scale, x.shape[0], (x.stride(0), 0))
    return Rows(out, scale)


def half_matrices(x: Tensor) -> Rows:
    """x [A, N, C] row by row, with factors [A, N]; the result is contiguous. x: any strides but of columns."""
    out, scale = new_rows(x, *x.shape, leading=2)
    _launch_rows(x, out, scale, x.shape[1], (x.stride(1), x.stride(0)))
    return Rows(out, scale)


def half_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [D, ...] as float16 numbers of at most 1, and each degree's factor [D], float32."""
    scale = weight.flatten(1).abs().amax(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale.view(-1, *[1] * (weight.ndim - 1))).to(FORMAT), scale


def row_bias(bias: Tensor, rows: int) -> Tensor:
    """A bias [C] of row 0 as one of every row, [M, C]."""
    return torch.cat([bias.unsqueeze(0), bias.new_zeros(rows - 1, bias.shape[0])])


@triton.jit
def _from_products_kernel(
    x, rows, groups, bias, beside, out, stride, group_stride, row_stride, row_group_stride, out_stride,
    out_group_stride, C, BIAS: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    factor = tl.load(rows + n * row_stride + m * row_group_stride) * tl.load(groups + m)
    v = load_numbers(x + n * stride + m * group_stride + c, c < C) * factor
    if BIAS:
        v += tl.load(bias + m * C + c, mask=c < C, other=0.0)
    at = n * out_stride + m * out_group_stride + c
    if BESIDE:
        v += tl.load(beside + at, mask=c < C, other=0.0)
    tl.store(out + at, v, mask=c < C)


def from_products(
    products: Tensor,
    factor: Tensor,
    groups: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """out [N, M, C] = products of float16 rows and weights times factor [N] or [N, M] and groups [M], plus bias [M, C].

    products [N, M, C] and out, float32: any strides that keep columns together. beside: with out's strides, added too.
    """
    if out.numel():
        nodes, matrices, columns = out.shape
        of_group = factor.stride(1) if factor.ndim == 2 else 0
        _from_products_kernel[nodes, matrices](
            products, factor, groups, out if bias is None else bias, out if beside is None else beside, out,
            *products.stride()[:2], factor.stride(0), of_group, *out.stride()[:2], columns, BIAS=bias is not None,
            BESIDE=beside is not None, BLOCK=next_power(columns), num_warps=1 if columns <= 512 else 4,
        )  # fmt: skip
    return out


@triton.jit
def _rows_from_products_kernel(
    x, rows, groups, bias, out, out_factor, stride, group_stride, row_stride, M, C,
    BIAS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    m, c = tl.arange(0, BM), tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    at = m[:, None] * C + c[None, :]
    factor = tl.load(rows + n * row_stride) * tl.load(groups + m, mask=m < M, other=0.0)
    y = load_numbers(x + n * stride + m[:, None] * group_stride + c[None, :], inside)
    y *= factor[:, None]
    if BIAS:
        y += tl.load(bias + at, mask=inside, other=0.0)
    store_half(y, out, n * M * C + at, inside, out_factor + n)


def rows_from_products(products: Tensor, factor: Tensor, groups: Tensor, bias: Tensor | None = None) -> Rows:
    """:func:`from_products` as rows, [N, M, C] with factors [N]. factor: [N], any stride."""
    nodes, matrices, columns = products.shape
    out = new_rows(factor, *products.shape)
    if products.numel():
        numbers = next_power(matrices) * next_power(columns)
        _rows_from_products_kernel[(nodes,)](
            products, factor, groups, factor if bias is None else bias, *out, *products.stride()[:2], factor.stride(0),
            matrices, columns, BIAS=bias is not None, BM=next_power(matrices), BC=next_power(columns),
            num_warps=8 if numbers > 4096 else 4,
        )  # fmt: skip
    return out
