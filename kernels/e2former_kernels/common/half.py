r"""float16 with a scale, where products may be rounded to TF32: the same 10 bits of mantissa, half the bytes.

TF32 rounds the factors of a product to 10 bits and keeps float32's range. float16 has the 10 bits and a small range, so
rows are divided by their largest number first: what is smaller than :math:`2^{-14}` of that loses bits, by at most
:math:`2^{-25}` of it, less than the rounding of a float32 sum over the row. Sums are taken in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.derived import derived
from e2former_kernels.common.tiles import next_power


def half_products(x: Tensor) -> bool:
    """Whether products of float32 tensors may be rounded as TF32 does (fairchem's ``tf32``)."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


@triton.jit
def _half_rows_kernel(x, out, scale, NUMBERS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + n * NUMBERS + c, mask=c < NUMBERS, other=0.0)
    top = tl.max(tl.abs(v), axis=0)
    top = tl.where(top > 0.0, top, 1.0)
    tl.store(out + n * NUMBERS + c, (v / top).to(tl.float16), mask=c < NUMBERS)
    tl.store(scale + n, top)


def half_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, ...] as float16 numbers of at most 1, and each row's factor [N], float32. x: float32, contiguous."""
    out, scale = torch.empty_like(x, dtype=torch.float16), x.new_empty(x.shape[0])
    if x.numel():
        numbers = x[0].numel()
        block = next_power(numbers)
        warps = 8 if block > 2048 else 4
        _half_rows_kernel[(x.shape[0],)](x, out, scale, NUMBERS=numbers, BLOCK=block, num_warps=warps)
    return out, scale


def half_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [D, ...] as float16 numbers of at most 1, and each degree's factor [D], float32."""
    return derived("half", weight, _half_weight)


def _half_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.flatten(1).abs().amax(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale.view(-1, *[1] * (weight.ndim - 1))).half(), scale


def half_product(x: Tensor, weight: Tensor, degrees: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out [B, n, O] = x [B, n, I] times weight [B, I, O] (any strides) times degrees [B], plus bias [B, O].

    x, degrees, bias, out: float32, x contiguous but for the order of B and n; weight: of :func:`half_weight`. A sum of
    I numbers of at most 1 stays far from float16's 65,504. No gradient.
    """
    if not out.numel():
        return out
    nodes_first = not x.is_contiguous()
    x = x.transpose(0, 1).contiguous() if nodes_first else x
    rows, scale = half_rows(x.flatten(0, 1))
    rows, scale = rows.view_as(x), scale.view(x.shape[:2])
    if nodes_first:
        rows, scale = rows.transpose(0, 1), scale.t()
    y = torch.bmm(rows, weight)
    factor = (scale * degrees.unsqueeze(1)).unsqueeze(-1)
    if bias is None:
        return torch.mul(y, factor, out=out)
    return torch.addcmul(bias.unsqueeze(1), y, factor, out=out)
