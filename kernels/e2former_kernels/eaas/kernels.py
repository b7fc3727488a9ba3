"""Triton kernels of the EAAS layer: an atom's rows in registers, every nonzero coefficient a line of the program.

``aligned_kernel`` is T(r) v and, with the lists of the way back, T(r)^T g; ``slope_kernel`` the gradient by the
position; ``pullback_kernel`` both gradients in one pass. No matrix, no padding: of the 180 numbers of T(r) at lmax 2,
50 are not zero (``reference.py`` lists them). Rows are tiles [BN, BC] of atoms and channels, and what belongs to an
atom alone is [BN, 1]. Sums run in the order of the lists, in the full precision of the type. A list is one flat tuple:
Triton 3.6 knows no nested ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(x, n, c, C, inside, ROWS: tl.constexpr):
    """The rows of x: [N, ROWS, C] as ROWS tiles."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(x + (n * ROWS + i) * C + c, mask=inside, other=0.0),)
    return rows


@triton.jit
def _position(position, n, in_n):
    """(x, y, z) of the atoms, [BN, 1] each."""
    x = tl.load(position + 3 * n, mask=in_n, other=0.0)
    y = tl.load(position + 3 * n + 1, mask=in_n, other=0.0)
    z = tl.load(position + 3 * n + 2, mask=in_n, other=0.0)
    return x, y, z


@triton.jit
def _mix(rows, TERMS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """out[i] = sum of k rows[j] over the entries (j, k) of lists FIRST..FIRST + COUNT; an empty sum is zero."""
    out = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        y = tl.zeros_like(rows[0])
        for t in tl.static_range(tl.constexpr(TERMS[i]), tl.constexpr(TERMS[i + 1]), 2):
            y += TERMS[t + 1] * rows[TERMS[t]]
        out = out + (y,)
    return out


@triton.jit
def _add_products(sums, factor, rows):
    """sums[i] + factor rows[i]."""
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (sums[i] + factor * rows[i],)
    return out


@triton.jit
def _turn(rows, cosines, sines, TURN: tl.constexpr, BACK: tl.constexpr):
    """Rotation about y by t, or back: out[i] = cos(m t) rows[i] +- sin(m t) rows[j]; (j, m, plus) = TURN[3i:3i+3]."""
    out = ()
    for i in tl.static_range(len(rows)):
        if TURN[3 * i + 1] == 0:
            y = rows[i]
        elif TURN[3 * i + 2] != BACK:
            y = cosines[TURN[3 * i + 1]] * rows[i] + sines[TURN[3 * i + 1]] * rows[TURN[3 * i]]
        else:
            y = cosines[TURN[3 * i + 1]] * rows[i] - sines[TURN[3 * i + 1]] * rows[TURN[3 * i]]
        out = out + (y,)
    return out


@triton.jit
def _multiples(cosine, sine, LMAX: tl.constexpr):
    """cos(m t) and sin(m t), m = 0..LMAX."""
    cosines, sines = (tl.zeros_like(cosine) + 1.0, cosine), (tl.zeros_like(sine), sine)
    for m in tl.static_range(1, LMAX):
        c, s = cosines[m] * cosine - sines[m] * sine, sines[m] * cosine + cosines[m] * sine
        cosines, sines = cosines + (c,), sines + (s,)
    return cosines, sines


@triton.jit
def _polar(a, b):
    """(length, a/length, b/length) of (a, b), and (0, 1, 0) at the origin.

    Scaled before squaring: the squares of tiny numbers lose their digits, and the frame would be no rotation.
    """
    big = tl.maximum(tl.abs(a), tl.abs(b))
    safe = tl.where(big > 0.0, big, 1.0)
    p, q = tl.where(big > 0.0, a / safe, 1.0), b / safe
    root = tl.sqrt(p * p + q * q)
    return big * root, p / root, q / root


@triton.jit(do_not_specialize=["N"])
def aligned_kernel(
    position, x, out, N, C,
    TURN_IN: tl.constexpr, SWAP_IN: tl.constexpr, PICK: tl.constexpr, SWAP_OUT: tl.constexpr, TURN_OUT: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, LMAX: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    r"""out = |r| D^T S D x: rotate, pick and scale rows, rotate back; D is never a matrix.

    D = Y(b) J Y(a): Y(a) turns about y until r lies in the plane x = 0, J swaps the axes x and y (constant), Y(b) turns
    about y until r lies on x. A turn mixes rows in pairs. S (PICK) is the coupling with the direction x. On the polar
    axis Y(a) is one, at the origin Y(b) too; |r| D^T S D does not depend on the frame.
    """
    n = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (n < N) & (c < C)
    r = _position(position, n, n < N)
    across, cos_a, sin_a = _polar(r[2], r[0])
    length, cos_b, sin_b = _polar(r[1], across)
    cos_a, sin_a = _multiples(cos_a, -sin_a, LMAX)
    cos_b, sin_b = _multiples(cos_b, -sin_b, LMAX)
    rows = _load_rows(x, n, c, C, inside, ROWS)
    rows = _turn(rows, cos_a, sin_a, TURN_IN, False)
    rows = _mix(rows, SWAP_IN, 0, ROWS)
    rows = _turn(rows, cos_b, sin_b, TURN_IN, False)
    rows = _mix(rows, PICK, 0, OUT)
    rows = _turn(rows, cos_b, sin_b, TURN_OUT, True)
    rows = _mix(rows, SWAP_OUT, 0, OUT)
    rows = _turn(rows, cos_a, sin_a, TURN_OUT, True)
    for i in tl.static_range(OUT):
        tl.store(out + (n * OUT + i) * C + c, length * rows[i], mask=inside)


@triton.jit(do_not_specialize=["N"])
def slope_kernel(
    paths, x, out, N, C,
    TERMS: tl.constexpr, PATHS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[n, b] = sum over p, c and the entries (m, k) of list 3p + b of k paths[n, p, c] x[n, m, c].

    One program has all channels of an atom and adds them in one order: no atomic additions, the same bits every time.
    """
    n = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    zero = tl.zeros([BN, BC], out.dtype.element_ty)
    sums = (zero, zero, zero)
    for start in range(0, C, BC):
        c = (start + tl.arange(0, BC))[None, :]
        inside = (n < N) & (c < C)
        rows = _load_rows(x, n, c, C, inside, ROWS)
        for p in tl.static_range(PATHS):
            path = tl.load(paths + (n * PATHS + p) * C + c, mask=inside, other=0.0)
            sums = _add_products(sums, path, _mix(rows, TERMS, 3 * p, 3))
    for b in tl.static_range(3):
        tl.store(out + 3 * n + b, tl.sum(sums[b], axis=1, keep_dims=True), mask=n < N)


@triton.jit(do_not_specialize=["N"])
def pullback_kernel(
    position, paths, x, out, slope, N, C,
    TERMS: tl.constexpr, SLOPE_TERMS: tl.constexpr, PATHS: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """T(r)^T of the path rows into out, as sums over the nonzeros, and :func:`slope_kernel` into slope.

    out[n, m, c] = sum of k r[n, b] paths[n, p, c] over the entries (b, p, k) of list m. The path rows are read once.
    """
    n = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    r = _position(position, n, n < N)
    zero = tl.zeros([BN, BC], out.dtype.element_ty)
    sums = (zero, zero, zero)
    for start in range(0, C, BC):
        c = (start + tl.arange(0, BC))[None, :]
        inside = (n < N) & (c < C)
        rows = _load_rows(x, n, c, C, inside, ROWS)
        grads = _load_rows(paths, n, c, C, inside, PATHS)
        for p in tl.static_range(PATHS):
            sums = _add_products(sums, grads[p], _mix(rows, SLOPE_TERMS, 3 * p, 3))
        for i in tl.static_range(ROWS):
            y = tl.zeros_like(zero)
            for t in tl.static_range(tl.constexpr(TERMS[i]), tl.constexpr(TERMS[i + 1]), 3):
                y += (TERMS[t + 2] * r[TERMS[t]]) * grads[TERMS[t + 1]]
            tl.store(out + (n * ROWS + i) * C + c, y, mask=inside)
    for b in tl.static_range(3):
        tl.store(slope + 3 * n + b, tl.sum(sums[b], axis=1, keep_dims=True), mask=n < N)
