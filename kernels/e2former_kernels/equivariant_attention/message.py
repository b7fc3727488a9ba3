r"""Messages: their orders, the numbers of an edge that multiply a value, and their sum; in PyTorch and for the kernels.

docs/network.md, sections 1.5 and 6.4 to 6.7. The kernels call an edge's B numbers its scale: 1 (order 0), 1/d (the form
``sum``), the direction, or that and its harmonics of degree 2. Value (:func:`store_scale`), change along a direction
(``_tangent``, ``_dot``), first and second derivative are here; the kernels of value, reverse and second derivative take
any B. A further order is an entry of :data:`DIRECTIONS`, its harmonics (``common/harmonics.py``), and a branch in each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from e2former_kernels.common.harmonics import degree_two, degree_two_back, degree_two_dot, solid_harmonics
from e2former_kernels.common.sums import segment_outer, segment_sum
from e2former_kernels.common.tiles import tl, triton

if TYPE_CHECKING:
    from e2former_kernels.equivariant_attention.reference import AttentionSpec

Form = Literal["dense", "relative", "sum"]
InverseDistance = Literal["v2", "v1_5"]
INVERSE_DISTANCES = get_args(InverseDistance)
#: B, how many numbers of an edge multiply the value, by the order of the message.
DIRECTIONS = (1, 3, 8)


def inverse_distance(spec: AttentionSpec, distance: Tensor) -> Tensor:
    """1/(d + 1e-8) (``v2``) or 1/max(d, 1e-6) (``v1_5``), 1/Å."""
    return 1.0 / (distance + 1e-8) if spec.inverse_distance == "v2" else 1.0 / distance.clamp(min=1e-6)


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Multiply rows [E, R, C] by weights [E, H]: channel c by head c mod H."""
    edges, num_rows, channels = rows.shape
    heads = weights.shape[-1]
    spread = rows.view(edges, num_rows, channels // heads, heads) * weights[:, None, None, :]
    return spread.view(edges, num_rows, channels)


def aggregate(
    spec: AttentionSpec,
    form: Form,
    weights: Tensor,
    distance: Tensor,
    vec: Tensor,
    value: Tensor,
    target: Tensor,
    num_nodes: int,
    coupling: Tensor | None,
) -> Tensor:
    r"""Sum of messages per receiver (docs/network.md, equations 6.12 to 6.15).

    order 0: sum_j w v_j. order 1: :math:`Q_p = \sum_j w_{ij} \sum_{b,m} C_{pbm} \hat r_{ij,b} v_{j,m}`, p running
    over the path rows. order 2: the same with :math:`(\hat r, Y^2(\hat r) / \sqrt 5)` for :math:`\hat r`. With
    ``form="sum"`` the value rows are added up as they are, divided by the distance.

    weights: [E, H]; distance: [E], Å; vec: [E, 3], r_i - r_j, Å; value: [E, M, C], of the edges' senders; target: [E],
    receivers, num_nodes of them; coupling: C, [P, B, M], for orders 1 and 2 but with ``form="sum"``. Returns
    [num_nodes, M, C] or, orders 1 and 2, [num_nodes, P, C].
    """
    if spec.order == 0:
        return segment_sum(_weighted(weights, value), target, num_nodes)
    scale = inverse_distance(spec, distance).to(weights.dtype).unsqueeze(-1)
    if form == "sum":
        return segment_sum(_weighted(weights * scale, value), target, num_nodes)
    assert coupling is not None
    direction = vec.to(weights.dtype) * scale
    if spec.order == 2:
        direction = torch.cat([direction, solid_harmonics(direction, 2)[:, 4:] / math.sqrt(5)], 1)
    rows, directions, num_rows = coupling.shape
    if form == "dense":
        by_axis = coupling.to(weights.dtype).transpose(0, 1).reshape(directions, rows * num_rows)
        matrix = (direction @ by_axis).view(-1, rows, num_rows)
        return segment_sum(torch.bmm(matrix, _weighted(weights, value)), target, num_nodes)
    weighted = _weighted(weights, value)
    outer = segment_outer(direction, weighted.flatten(1), target, num_nodes)
    outer = outer.view(num_nodes, directions * num_rows, value.shape[-1])
    return torch.einsum("pk,nkc->npc", coupling.to(outer.dtype).reshape(rows, -1), outer)


@triton.jit
def inverse_of(d, V2: tl.constexpr):
    """1/d as the specification regularises it, and its derivative."""
    if V2:
        inv = 1.0 / (d + 1e-8)
        slope = -inv * inv
    else:
        inv = 1.0 / tl.maximum(d, 1e-6)
        slope = tl.where(d > 1e-6, -inv * inv, 0.0)
    return inv, slope


@triton.jit
def _inverse_bend(d, inv, V2: tl.constexpr):
    """Second derivative of :func:`inverse_of`, whose value is inv."""
    bend = 2.0 * inv * inv * inv
    if not V2:
        bend = tl.where(d > 1e-6, bend, 0.0)
    return bend


@triton.jit
def _store_row(scale, e, inside, x, y, z, s, B: tl.constexpr):
    """Row e of scale [E, B]: x, y, z and the five of degree 2."""
    tl.store(scale + B * e, x, mask=inside)
    tl.store(scale + B * e + 1, y, mask=inside)
    tl.store(scale + B * e + 2, z, mask=inside)
    if B == 8:
        for k in tl.static_range(5):
            tl.store(scale + B * e + 3 + k, s[k], mask=inside)


@triton.jit
def store_scale(scale, e, inside, x, y, z, d, V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr):
    """Row e of scale [E, B]."""
    inv, _ = inverse_of(d, V2)
    if B > 1:
        x, y, z = x * inv, y * inv, z * inv
        _store_row(scale, e, inside, x, y, z, degree_two(x, y, z), B)
    else:
        if ORDER == 0:
            inv = 0.0 * inv + 1.0
        tl.store(scale + e, inv, mask=inside)


@triton.jit
def store_scale_tangent(
    scale, scale_dot, e, inside, x, y, z, d, cx, cy, cz, d_dot,
    V2: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows e of scale and of its change along (cx, cy, cz), with which the length changes by d_dot."""
    inv, slope = inverse_of(d, V2)
    inv_dot = slope * d_dot
    if B > 1:
        cx, cy, cz = cx * inv + x * inv_dot, cy * inv + y * inv_dot, cz * inv + z * inv_dot
        x, y, z = x * inv, y * inv, z * inv
        _store_row(scale, e, inside, x, y, z, degree_two(x, y, z), B)
        _store_row(scale_dot, e, inside, cx, cy, cz, degree_two_dot(x, y, z, cx, cy, cz), B)
    else:
        if ORDER == 0:
            inv = 0.0 * inv + 1.0
            inv_dot = 0.0 * inv
        tl.store(scale + e, inv, mask=inside)
        tl.store(scale_dot + e, inv_dot, mask=inside)


@triton.jit
def total_of(at, stride, inside, S: tl.constexpr):
    """Sum of S numbers ``stride`` apart."""
    total = tl.load(at, mask=inside, other=0.0)
    for n in tl.static_range(1, S):
        total += tl.load(at + n * stride, mask=inside, other=0.0)
    return total


@triton.jit
def add_scale_reverse(
    g, grad_parts, e, stride, plane, inside, x, y, z, d, S: tl.constexpr, V2: tl.constexpr, B: tl.constexpr
):
    """g plus the gradient by the length, and that by the vector, from grad_parts [B, S, E], by scale in S parts."""
    inv, slope = inverse_of(d, V2)
    if B > 1:
        gx = total_of(grad_parts + e, stride, inside, S)
        gy = total_of(grad_parts + plane + e, stride, inside, S)
        gz = total_of(grad_parts + 2 * plane + e, stride, inside, S)
        if B == 8:
            further = ()
            for k in tl.static_range(3, 8):
                further = further + (total_of(grad_parts + k * plane + e, stride, inside, S),)
            f0, f1, f2, f3, f4 = further
            ax, ay, az = degree_two_back(f0, f1, f2, f3, f4, x * inv, y * inv, z * inv)
            gx, gy, gz = gx + ax, gy + ay, gz + az
        g += slope * (gx * x + gy * y + gz * z)
    else:
        gx, gy, gz = 0.0 * x, 0.0 * x, 0.0 * x
        g += slope * total_of(grad_parts + e, stride, inside, S)
    return g, gx * inv, gy * inv, gz * inv


@triton.jit
def _totals(parts, e, inside, E, tiles, N: tl.constexpr):
    """Sum over the tiles of parts [tiles, E, N], a tuple."""
    totals = ()
    for n in tl.static_range(N):
        totals = totals + (tl.load(parts + e * N + n, mask=inside, other=0.0),)
    for k in range(1, tiles):
        added = ()
        for n in tl.static_range(N):
            added = added + (totals[n] + tl.load(parts + (k * E + e) * N + n, mask=inside, other=0.0),)
        totals = added
    return totals


@triton.jit
def add_scale_second(
    g, g_dot, vx, vy, vz, grad_scale, e, inside, E, tiles, x, y, z, d, cx, cy, cz, d_dot, V2: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """g and g_dot plus the gradients by length and its change, v plus that by the vector, from grad_scale.

    It has those by scale, then by its change, [tiles, E, 2 B]; c is the vector's change.
    """
    inv, slope = inverse_of(d, V2)
    # the value enters through s = p (1/d), p = vec or 1, and its change p' (1/d) + p (1/d)_d d'
    bend = _inverse_bend(d, inv, V2)
    s = _totals(grad_scale, e, inside, E, tiles, 2 * B)
    if B > 1:
        gs0, gs1, gs2, hs0, hs1, hs2 = s[0], s[1], s[2], s[B], s[B + 1], s[B + 2]
        if B == 8:  # and through harmonics of s, quadratic in it
            inv_dot = slope * d_dot
            a, b, c = degree_two_back(s[3], s[4], s[5], s[6], s[7], x * inv, y * inv, z * inv)
            gs0, gs1, gs2 = gs0 + a, gs1 + b, gs2 + c
            a, b, c = degree_two_back(
                s[11], s[12], s[13], s[14], s[15],
                cx * inv + x * inv_dot, cy * inv + y * inv_dot, cz * inv + z * inv_dot,
            )  # fmt: skip
            gs0, gs1, gs2 = gs0 + a, gs1 + b, gs2 + c
            a, b, c = degree_two_back(s[11], s[12], s[13], s[14], s[15], x * inv, y * inv, z * inv)
            hs0, hs1, hs2 = hs0 + a, hs1 + b, hs2 + c
        along = gs0 * x + gs1 * y + gs2 * z
        along_dot = hs0 * x + hs1 * y + hs2 * z
        g += slope * (along + hs0 * cx + hs1 * cy + hs2 * cz)
        vx += gs0 * inv + hs0 * slope * d_dot
        vy += gs1 * inv + hs1 * slope * d_dot
        vz += gs2 * inv + hs2 * slope * d_dot
    else:
        along_dot = s[1]
        g += slope * s[0]
    g += bend * d_dot * along_dot
    g_dot += slope * along_dot
    return g, g_dot, vx, vy, vz
