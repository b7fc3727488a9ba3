"""The coupling's contraction of an atom's outer products, or of path rows with its transpose: one product an atom."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.half import Rows, half_rows, new_rows
from e2former_kernels.common.tiles import next_power


@triton.jit
def contract_kernel(
    matrix, x, out, P, K, C, PP: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr
):
    """out[n, p, c] = sum_k matrix[p, k] x[n, k, c] for a small matrix: the Clebsch-Gordan contraction of one atom."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p, k = tl.arange(0, PP), tl.arange(0, KP)
    a = tl.load(matrix + p[:, None] * K + k[None, :], mask=(p[:, None] < P) & (k[None, :] < K), other=0.0)
    inside = c[None, :] < C
    b = tl.load(x + n * K * C + k[:, None] * C + c[None, :], mask=(k[:, None] < K) & inside, other=0.0)
    y = tl.dot(a, b.to(a.dtype), input_precision=PRECISION, out_dtype=a.dtype).to(out.dtype.element_ty)
    tl.store(out + n * P * C + p[:, None] * C + c[None, :], y, mask=(p[:, None] < P) & inside)


@triton.jit
def contract_rows_kernel(
    matrix, x, out, out_factor, P, K, C, PP: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr
):
    """The result of contract_kernel as float16 rows with their factor (common/half.py); a program has all channels."""
    n = tl.program_id(0).to(tl.int64)
    c, p, k = tl.arange(0, BC), tl.arange(0, PP), tl.arange(0, KP)
    a = tl.load(matrix + p[:, None] * K + k[None, :], mask=(p[:, None] < P) & (k[None, :] < K), other=0.0)
    b = tl.load(x + n * K * C + k[:, None] * C + c[None, :], mask=(k[:, None] < K) & (c[None, :] < C), other=0.0)
    y = tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)
    top = tl.max(tl.abs(y))
    top = tl.where(top > 0.0, top, 1.0)
    inside = (p[:, None] < P) & (c[None, :] < C)
    tl.store(out + n * P * C + p[:, None] * C + c[None, :], (y / top).to(tl.float16), mask=inside)
    tl.store(out_factor + n, top)


def launch_contract(matrix: Tensor, x: Tensor, out: Tensor, precision: str) -> None:
    """out[n, P, C] = matrix [P, K] times x[n, K, C], all contiguous; x and out may be float16.

    precision: ``input_precision`` of ``tl.dot``.
    """
    nodes, inner, channels = x.shape
    if not out.numel():
        return
    block = min(max(next_power(channels), 16), 128)
    contract_kernel[nodes, triton.cdiv(channels, block)](
        matrix, x, out, matrix.shape[0], inner, channels,
        PP=max(next_power(matrix.shape[0]), 16), KP=max(next_power(inner), 16), BC=block,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip


LARGEST_CONTRACTION = 1 << 15  # numbers that one program holds, 128 a thread


def contract_rows(matrix: Tensor, x: Tensor, precision: str) -> Rows:
    """:func:`launch_contract` to float16 rows [n, P, C] with factors [n]; matrix and x are float32."""
    nodes, inner, channels = x.shape
    paths = matrix.shape[0]
    block, padded = max(next_power(channels), 16), max(next_power(paths), 16)
    if block * padded > LARGEST_CONTRACTION:
        out = x.new_empty(nodes, paths, channels)
        launch_contract(matrix, x, out, precision)
        return half_rows(out)
    rows = new_rows(x, nodes, paths, channels)
    if rows.numbers.numel():
        contract_rows_kernel[(nodes,)](
            matrix, x, *rows, paths, inner, channels, PP=padded, KP=max(next_power(inner), 16), BC=block,
            PRECISION=precision, num_warps=8 if block * padded > 4096 else 4,
        )  # fmt: skip
    return rows
