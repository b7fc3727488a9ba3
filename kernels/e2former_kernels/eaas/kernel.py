"""Triton kernel of the tensor product of an atom's features with its own position."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position_kernel(
    coupling, position, x, out, P, M, C,
    TRANSPOSE: tl.constexpr, PP: tl.constexpr, MP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n, p, c] = sum_m T[p, m] x[n, m, c] with T = sum_b C[p, b, m] r[n, b], made in registers.

    TRANSPOSE: out[n, m, c] = sum_p T[p, m] x[n, p, c].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p, m = tl.arange(0, PP), tl.arange(0, MP)
    inside = (p[:, None] < P) & (m[None, :] < M)
    at = coupling + p[:, None] * 3 * M + m[None, :]
    t = tl.load(position + 3 * n) * tl.load(at, mask=inside, other=0.0)
    t += tl.load(position + 3 * n + 1) * tl.load(at + M, mask=inside, other=0.0)
    t += tl.load(position + 3 * n + 2) * tl.load(at + 2 * M, mask=inside, other=0.0)
    in_c = c[None, :] < C
    to_p = p[:, None] * C + c[None, :]
    to_m = m[:, None] * C + c[None, :]
    if TRANSPOSE:
        v = tl.load(x + n * P * C + to_p, mask=(p[:, None] < P) & in_c, other=0.0)
        y = tl.dot(tl.trans(t), v, input_precision=PRECISION, out_dtype=out.dtype.element_ty)
        tl.store(out + n * M * C + to_m, y, mask=(m[:, None] < M) & in_c)
    else:
        v = tl.load(x + n * M * C + to_m, mask=(m[:, None] < M) & in_c, other=0.0)
        y = tl.dot(t, v, input_precision=PRECISION, out_dtype=out.dtype.element_ty)
        tl.store(out + n * P * C + to_p, y, mask=(p[:, None] < P) & in_c)
