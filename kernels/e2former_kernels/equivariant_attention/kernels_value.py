r"""Triton kernels of the attention's value: neighbours are streamed. First derivative: ``kernels_reverse.py``.

Layout: a value row of C channels with head c mod H is a [C/H, H] matrix, so the value of an atom is a [R, H] matrix,
R = (lmax+1)^2 C/H, and a head's weight multiplies a column. B numbers of an edge multiply a row (8: order 2, harmonics
of degrees 1 and 2; 3: order 1, the direction; 1: a plain weighted sum). A program has one atom and BH heads, so nothing
crosses a warp but sums over heads; its rows are split in RA + RB (``row_tiles``). What each of the B has is a tuple.

Features of an edge are the gate g (columns 0 to H) and the head's input p (columns H to 2H) of the radial network: an
array [E, 2H], or with SPLINE a spline (``radial/splines.py``) at row ``row[e]``, position ``position[e]``.
Scores are a = g <q, k> / sqrt(S). How weights w are made of them, and NORM, SOFTMAX and MAXIMUM: ``attention_norm.py``.

With HALF the rows that programs gather are float16 (``common/half.py``); *_factor has a number for each of their atoms.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from e2former_kernels.common.half import Rows, half_rows, new_rows, store_half
from e2former_kernels.common.tiles import next_power
from e2former_kernels.equivariant_attention.attention_norm import add_to_sum, shift_of_none, times_share, with_constant
from e2former_kernels.radial.splines import cubic, ends, feature, load


@triton.jit
def places(first, ROWS: tl.constexpr, R, columns, in_columns, C):
    """Where rows first to first + ROWS of a matrix [R, C] have these columns, and which of these numbers there are."""
    r = first + tl.arange(0, ROWS)
    return r[:, None] * C + columns[None, :], (r[:, None] < R) & in_columns[None, :]


@triton.jit
def places_of_heads(h, in_h, S, BS: tl.constexpr):
    """Where heads h of a matrix [H, S] lie, and which of these numbers there are."""
    s = tl.arange(0, BS)
    return h[:, None] * S + s[None, :], in_h[:, None] & (s[None, :] < S)


@triton.jit
def no_rows(B: tl.constexpr, ROWS: tl.constexpr, BH: tl.constexpr, dtype: tl.constexpr):
    """Zeros [ROWS, BH] for each of the B."""
    rows = ()
    for _ in tl.static_range(B):
        rows = rows + (tl.zeros([ROWS, BH], dtype=dtype),)
    return rows


@triton.jit
def load_rows(x, at, mask, stride, B: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr):
    """x[b, at] for each of the B, which are ``stride`` apart."""
    rows = ()
    for b in tl.static_range(B):
        rows = rows + (load(x + b * stride + at, mask, MASKED).to(dtype),)
    return rows


@triton.jit
def store_rows(x, at, mask, stride, rows, B: tl.constexpr):
    """x[b, at] = rows for each of the B."""
    for b in tl.static_range(B):
        tl.store(x + b * stride + at, rows[b], mask=mask)


@triton.jit
def load_scale(scale, e, B: tl.constexpr):
    """The B numbers of an edge."""
    s = ()
    for b in tl.static_range(B):
        s = s + (tl.load(scale + e * B + b),)
    return s


@triton.jit
def add_scaled(rows, s, x, B: tl.constexpr):
    """Each of the B plus its number times x."""
    added = ()
    for b in tl.static_range(B):
        added = added + (rows[b] + s[b] * x,)
    return added


@triton.jit
def dots(x, rows, B: tl.constexpr):
    """Sums over the rows of x times each of the B."""
    found = ()
    for b in tl.static_range(B):
        found = found + (tl.sum(x * rows[b], axis=0),)
    return found


@triton.jit
def weighted(s, rows, B: tl.constexpr):
    """Sum over the B of their numbers times their rows."""
    total = s[0] * rows[0]
    for b in tl.static_range(1, B):
        total += s[b] * rows[b]
    return total


@triton.jit
def add_each(a, b, B: tl.constexpr):
    """Sums of two for each of the B."""
    found = ()
    for n in tl.static_range(B):
        found = found + (a[n] + b[n],)
    return found


@triton.jit
def score_kernel(
    query, query_factor, key, key_factor, features, row, position, envelope, source, row_ptr, score, top, total,
    inverse_root, constant,
    H: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr, SOFTMAX: tl.constexpr, MAXIMUM: tl.constexpr,
    SPLINE: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """score[e, h] = a for the edges of one receiver, and the softmax's shift and sum, top and total [n, H].

    Edges are taken BE at a time, so that as many keys are on their way.
    """
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    at, mask = places_of_heads(h, in_h, S, BS)
    first, last = tl.load(row_ptr + i), tl.load(row_ptr + i + 1)
    dtype = score.dtype.element_ty
    q = tl.load(query + i * H * S + at, mask=mask, other=0.0).to(dtype)
    if HALF:
        inverse_root *= tl.load(query_factor + i)
    m = shift_of_none(BH, dtype, MAXIMUM)
    t = tl.zeros([BH], dtype=dtype)
    for begin in range(first, last, BE):
        e = begin + tl.arange(0, BE)
        here = e < last
        j = tl.load(source + e, mask=here, other=0).to(tl.int64)
        both = here[:, None] & in_h[None, :]
        k = tl.load(
            key + j[:, None, None] * (H * S) + at[None, :, :], mask=here[:, None, None] & mask[None, :, :], other=0.0
        )
        a = tl.sum(q[None, :, :] * k.to(dtype), axis=2) * inverse_root
        if HALF:
            a *= tl.load(key_factor + j, mask=here, other=0.0)[:, None]
        if SPLINE:
            rows = tl.load(row + e, mask=here, other=0).to(tl.int64)[:, None]
            f = tl.load(position + e, mask=here, other=0.0)[:, None]
            v0, s0, v1, s1 = ends(features, rows, h[None, :], 2 * H, both, True)
            a *= cubic(v0, s0, v1, s1, f)
        else:
            a *= tl.load(features + e[:, None] * (2 * H) + h[None, :], mask=both, other=0.0)
        tl.store(score + e[:, None] * H + h[None, :], a, mask=both)
        if SOFTMAX:
            u = tl.load(envelope + e, mask=here, other=0.0)
            m, t = add_to_sum(m, t, tl.where(here[:, None], a, -float("inf")), u)
    if SOFTMAX:
        t = with_constant(m, t, constant, MAXIMUM)
        tl.store(top + i * H + h, m, mask=in_h)
        tl.store(total + i * H + h, t, mask=in_h)


@triton.jit
def attend_kernel(
    score, features, row, position, envelope, scale, value, value_factor, source, row_ptr, top, total, out,
    R: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, SOFTMAX: tl.constexpr, MAXIMUM: tl.constexpr,
    SPLINE: tl.constexpr, HALF: tl.constexpr, B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr,
    EACH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[i, b, r, h] = sum over the edges e of i of w[e, h] scale[e, b] value[source(e), r, h], [n, B, R, H]."""
    MASKED: tl.constexpr = H % BH != 0
    MASKED_B: tl.constexpr = MASKED or RA + RB != R
    i = tl.program_id(0).to(tl.int64)
    h = tl.max_contiguous(tl.program_id(1) * BH + tl.arange(0, BH), EACH)
    in_h = h < H
    at_a, mask_a = places(0, RA, R, h, in_h, H)
    dtype = out.dtype.element_ty
    sum_a = no_rows(B, RA, BH, dtype)
    if RB > 0:
        at_b, mask_b = places(RA, RB, R, h, in_h, H)
        sum_b = no_rows(B, RB, BH, dtype)
    m, inv = 0.0, 1.0
    if SOFTMAX:
        m = load(top + i * H + h, in_h, MASKED)
        inv = 1.0 / tl.load(total + i * H + h, mask=in_h, other=1.0)
    for e in tl.range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1), loop_unroll_factor=UNROLL):
        j = tl.load(source + e).to(tl.int64)
        base = value + j * (R * H)
        x = load(base + at_a, mask_a, MASKED)
        if RB > 0:
            y = load(base + at_b, mask_b, MASKED_B)
        a = load(score + e * H + h, in_h, MASKED)
        w = tl.load(envelope + e) * feature(features, row, position, e, H + h, in_h, 2 * H, SPLINE, MASKED)
        w = times_share(w, a, m, inv, NORM, SOFTMAX)
        if HALF:
            w *= tl.load(value_factor + j)
        s = load_scale(scale, e, B)
        sum_a = add_scaled(sum_a, s, x.to(dtype) * w[None, :], B)
        if RB > 0:
            sum_b = add_scaled(sum_b, s, y.to(dtype) * w[None, :], B)
    base = out + i * (B * R * H)
    store_rows(base, at_a, mask_a, R * H, sum_a, B)
    if RB > 0:
        store_rows(base, at_b, mask_b, R * H, sum_b, B)


@triton.jit
def contract_kernel(
    matrix, x, out, out_factor, P, K, C,
    PP: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out[n, p, c] = sum_k matrix[p, k] x[n, k, c] for a small matrix: the Clebsch-Gordan contraction of one atom.

    HALF: as float16 rows with their factor (common/half.py); then a program has all channels.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p, k = tl.arange(0, PP), tl.arange(0, KP)
    a = tl.load(matrix + p[:, None] * K + k[None, :], mask=(p[:, None] < P) & (k[None, :] < K), other=0.0)
    inside = c[None, :] < C
    b = tl.load(x + n * K * C + k[:, None] * C + c[None, :], mask=(k[:, None] < K) & inside, other=0.0)
    y = tl.dot(a, b.to(a.dtype), input_precision=PRECISION, out_dtype=a.dtype)
    at = n * P * C + p[:, None] * C + c[None, :]
    if HALF:
        store_half(y, out, at, (p[:, None] < P) & inside, out_factor + n)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=(p[:, None] < P) & inside)


CONTRACTION_NUMBERS = 3 << 13  # of matrix and x in a program of contract_kernel: 96 KiB of shared memory
LARGEST_MATRIX = 5 << 13  # of matrix and 16 columns of x, the least that a program takes: 160 KiB


def fits(matrix: Tensor) -> bool:
    """Whether a program of :func:`contract_kernel` holds a matrix; not so order 2, lmax 4, cross products."""
    paths, inner = (max(next_power(n), 16) for n in matrix.shape)
    return (paths + 16) * inner <= LARGEST_MATRIX


def launch_contract(matrix: Tensor, x: Tensor, out: Tensor, precision: str) -> None:
    """out[n, P, C] = matrix [P, K] times x[n, K, C], all contiguous; x, out may be float16. precision: ``tl.dot``'s."""
    nodes, inner, channels = x.shape
    if not out.numel():
        return
    if not fits(matrix):
        out.copy_(matrix @ x.to(matrix.dtype))
        return
    paths, padded = max(next_power(matrix.shape[0]), 16), max(next_power(inner), 16)
    block = min(max(next_power(channels), 16), 128)
    while block > 16 and (paths + block) * padded > CONTRACTION_NUMBERS:
        block //= 2
    contract_kernel[nodes, math.ceil(channels / block)](
        matrix, x, out, x, matrix.shape[0], inner, channels, PP=paths, KP=padded, BC=block,
        PRECISION=precision, HALF=False, num_warps=4,
    )  # fmt: skip


LARGEST_CONTRACTION = 1 << 15  # numbers that one program holds, 128 a thread


def contract_rows(matrix: Tensor, x: Tensor, precision: str) -> Rows:
    """:func:`launch_contract` to float16 rows [n, P, C] with factors [n]; matrix and x are float32."""
    nodes, inner, channels = x.shape
    paths = matrix.shape[0]
    block, padded = max(next_power(channels), 16), max(next_power(paths), 16)
    if block * padded > LARGEST_CONTRACTION or not fits(matrix):
        out = x.new_empty(nodes, paths, channels)
        launch_contract(matrix, x, out, precision)
        return half_rows(out)
    rows = new_rows(x, nodes, paths, channels)
    if rows.numbers.numel():
        contract_kernel[nodes, 1](
            matrix, x, *rows, paths, inner, channels, PP=padded, KP=max(next_power(inner), 16), BC=block,
            PRECISION=precision, HALF=True, num_warps=8 if block * padded > 4096 else 4,
        )  # fmt: skip
    return rows
