r"""How weights are made of scores: the table of attention norms, and the formula of each in PyTorch and for kernels.

docs/network.md, section 6.3. A norm is an entry of :data:`NORMS` and the branches below that its flags lead to: of
value, first derivative (``_reverse``), change along a direction (``_tangent``, and ``_dot``) and second derivative.
Nothing else asks which norms there are. Norms without a sum over neighbours are one function f of the score,
w = f(a) u p, and need only :func:`activation`, :func:`times_slope` and :func:`activation_bend`.

In the kernels NORM is the name, SOFTMAX and MAXIMUM are the flags of :meth:`AttentionNorm.flags`. Softmax: m is the
shift, t the sum, inv = 1 / t, ``constant`` what stands beside the sum, z = exp(a - m) inv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.common.sums import segment_max, segment_sum
from e2former_kernels.common.tiles import tl, triton


@dataclass(frozen=True)
class AttentionNorm:
    """One attention norm.

    softmax: weights are divided by a sum over the receiver's edges, plus ``constant``; else they are ``function`` of
    the score. maximum: the softmax's shift m, the largest score, is part of the function and is differentiated; without
    it the constant goes as exp(-m), and the function does not depend on m. kernels: it has its branches below. keys:
    what the configuration calls it, its name by default.
    """

    name: str
    function: Callable[[Tensor], Tensor] | None = None
    softmax: bool = False
    maximum: bool = False
    constant: float = 0.0
    kernels: bool = False
    keys: tuple[str, ...] = ()

    @cached_property
    def flags(self) -> dict[str, str | bool]:
        """Constants of the kernels."""
        return {"NORM": self.name, "SOFTMAX": self.softmax, "MAXIMUM": self.maximum}


# The constant beside the softmax's sum. Both releases have 1e-3. With that in the smooth norm an atom keeps all its
# weight on its last neighbour until the envelope is down to 1e-3 exp(-score): continuous, but a force of 2.9 eV/Å
# within 0.3 Å of the cutoff (quickstart, H pulled off CH3OH). With 1 the weight goes as the envelope does.
MOLFM_CONSTANT = 1e-3
SMOOTH_CONSTANT = 1.0

#: By name, as the specification says it.
NORMS: Mapping[str, AttentionNorm] = {
    norm.name: norm
    for norm in (
        AttentionNorm("smooth", softmax=True, constant=SMOOTH_CONSTANT, kernels=True),
        AttentionNorm("molfm", None, True, True, MOLFM_CONSTANT, kernels=True, keys=("molfm_v2", "molfm_v1_5")),
        AttentionNorm("softplus", F.softplus, kernels=True),
        AttentionNorm("sigmoid", torch.sigmoid, kernels=True),
    )
}
#: Name by what the key ``attention_norm`` says.
NORM_OF_KEY = {key: norm.name for norm in NORMS.values() for key in norm.keys or (norm.name,)}


def attention_weights(
    score: Tensor, head: Tensor, envelope: Tensor, target: Tensor, num_nodes: int, name: str
) -> Tensor:
    r"""Edge weights from scores a, input heads p and the envelope u (docs/network.md, equations 6.8 to 6.11).

    ``smooth``:  w = exp(a) u p / (sum exp(a) u + c), c = 1, evaluated as U p / (sum U + c exp(-m)) with
    U = exp(a - m) u and any m: continuous when an edge enters or leaves, and when the strongest edge changes.
    ``molfm``:   w = U p / (sum U + c), c = 1e-3, with m = max_j a; m is part of the function and is differentiated.
    ``softplus``, ``sigmoid``: w = f(a) u p.

    score, head: [E, H]; envelope: [E]; target: [E], receivers, num_nodes of them. Returns w, [E, H], no unit.
    """
    u, norm = envelope.unsqueeze(-1), NORMS[name]
    if not norm.softmax:
        return norm.function(score) * u * head
    if norm.maximum:
        top = segment_max(score, target, num_nodes)
        floor = torch.full_like(top, norm.constant)
    else:
        with torch.no_grad():
            index = target.unsqueeze(1).expand_as(score)
            top = score.new_zeros((num_nodes, score.shape[1])).scatter_reduce(0, index, score, "amax")
        floor = norm.constant * torch.exp(-top)
    unnormalised = torch.exp(score - top.index_select(0, target)) * u
    total = segment_sum(unnormalised, target, num_nodes) + floor
    return unnormalised * head / total.index_select(0, target)


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a))."""
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def softplus(a):
    """log(1 + exp(a))."""
    return tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))


@triton.jit
def activation(a, NORM: tl.constexpr):
    """f of a norm without a sum."""
    if NORM == "softplus":
        f = softplus(a)
    else:
        tl.static_assert(NORM == "sigmoid")
        f = sigmoid(a)
    return f


@triton.jit
def times_slope(w, a, f, NORM: tl.constexpr):
    """w times f'(a) of a norm without a sum. f: f(a)."""
    if NORM == "softplus":
        w = w * sigmoid(a)
    else:
        tl.static_assert(NORM == "sigmoid")
        w = w * f * (1.0 - f)
    return w


@triton.jit
def activation_bend(a, NORM: tl.constexpr):
    """f(a), f'(a), f''(a) of a norm without a sum."""
    s = sigmoid(a)
    if NORM == "softplus":
        f = softplus(a)
        slope = s
        bend = s * (1.0 - s)
    else:
        tl.static_assert(NORM == "sigmoid")
        f = s
        slope = s * (1.0 - s)
        bend = slope * (1.0 - 2.0 * s)
    return f, slope, bend


@triton.jit
def shift_of_none(BH: tl.constexpr, dtype: tl.constexpr, MAXIMUM: tl.constexpr):
    """m before the first edge: the smallest there is, or zero, which bounds the constant's exp(-m)."""
    m = tl.zeros([BH], dtype=dtype)
    if MAXIMUM:
        m = m - float("inf")
    return m


@triton.jit
def add_to_sum(m, t, a, u):
    """m and t with further edges: scores a [edges, heads], -inf where there is none; envelope u [edges]."""
    shift = tl.maximum(m, tl.max(a, axis=0))
    t = t * tl.exp(m - shift) + tl.sum(tl.exp(a - shift[None, :]) * u[:, None], axis=0)
    return shift, t


@triton.jit
def with_constant(m, t, constant, MAXIMUM: tl.constexpr):
    """t and what stands beside it."""
    if MAXIMUM:
        t += constant
    else:
        t += constant * tl.exp(-m)
    return t


@triton.jit
def times_share(w, a, m, inv, NORM: tl.constexpr, SOFTMAX: tl.constexpr):
    """w times z or f(a)."""
    if SOFTMAX:
        w = w * tl.exp(a - m) * inv
    else:
        w = w * activation(a, NORM)
    return w


@triton.jit
def share(a, m, inv, NORM: tl.constexpr, SOFTMAX: tl.constexpr):
    """z or f(a): the weight without envelope and head."""
    if SOFTMAX:
        z = tl.exp(a - m) * inv
    else:
        z = activation(a, NORM)
    return z


@triton.jit
def weight_reverse(
    gw, a, u, p, m, inv, summed, at_maximum, constant, NORM: tl.constexpr, SOFTMAX: tl.constexpr, MAXIMUM: tl.constexpr
):
    """w, and from the gradient gw by it those by a, u and p.

    summed: the sum of gw w over the receiver's edges; at_maximum: where m is taken from. Softmax only.
    """
    z = share(a, m, inv, NORM, SOFTMAX)
    w = z * u * p
    gp = gw * z * u
    if SOFTMAX:
        gu = (gw * p - summed) * z
        ga = gu * u
        if MAXIMUM:
            ga -= tl.where(at_maximum, constant * inv * summed, 0.0)
    else:
        ga = times_slope(gw * u * p, a, z, NORM)
        gu = gw * z * p
    return w, ga, gu, gp


@triton.jit
def add_to_sum_tangent(m, m_dot, t, t_dot, best, a, a_dot, u, u_dot, e, MAXIMUM: tl.constexpr):
    """:func:`add_to_sum` of one edge e with changes; best: the edge that m is taken from."""
    higher = a > m
    shift = tl.where(higher, a, m)
    fade = tl.exp(m - shift)
    z = tl.exp(a - shift)
    t = t * fade + z * u
    t_dot = t_dot * fade + z * (u * a_dot + u_dot)
    if MAXIMUM:
        m_dot = tl.where(higher, a_dot, m_dot)
        best = tl.where(higher, e, best)
    return shift, m_dot, t, t_dot, best


@triton.jit
def drift_of(m_dot, t, t_dot, constant, MAXIMUM: tl.constexpr):
    """sigma, the receiver's t' / t: the sum of delta over its edges. t: with the constant."""
    sigma = t_dot / t
    if MAXIMUM:
        sigma -= m_dot * (1.0 - constant / t)
    return sigma


@triton.jit
def softmax_tangent(a, change, u, u_dot, p, p_dot, m, t, sigma):
    """w = pi p and w' = (delta - pi sigma) p + pi p' of the softmax.

    change: a' - m' (m' = 0 without MAXIMUM, where nothing depends on m); zeta = exp(a - m) / t, pi = zeta u,
    delta = zeta (u (a' - m') + u').
    """
    zeta = tl.exp(a - m) / t
    pi = zeta * u
    delta = zeta * (u * change + u_dot)
    return pi * p, (delta - pi * sigma) * p + pi * p_dot


@triton.jit
def activation_tangent(a, a_dot, u, u_dot, p, p_dot, NORM: tl.constexpr):
    """w and w' of a norm without a sum."""
    f, slope, _ = activation_bend(a, NORM)
    return f * u * p, slope * a_dot * u * p + f * (u_dot * p + u * p_dot)


@triton.jit
def softmax_second(
    gw, gw_dot, a, change, u, u_dot, p, p_dot, m, t, sigma, back, both, at_maximum, constant, MAXIMUM: tl.constexpr
):
    """From the gradients W, W' by w, w' of :func:`softmax_tangent` those by a, a', u, u', p, p'.

    back, both: sums over the receiver's edges of W' w and of W' w' + W w. With A = W' p, D = A - back,
    P = W p + W' p' - sigma A and mu = both - sigma back the gradients by a' and a are D pi and D delta + P pi - mu pi,
    those by u' and u D zeta and D zeta (a' - m') + (P - mu) zeta. MAXIMUM: the edge that m is taken from has what all
    edges pass to m, (back, mu) times constant / t, subtracted.
    """
    mu = both - sigma * back
    zeta = tl.exp(a - m) / t
    pi = zeta * u
    delta = zeta * (u * change + u_dot)
    drive = gw_dot * p
    rest = gw * p + gw_dot * p_dot - sigma * drive - mu
    drive -= back
    gp = gw * pi + gw_dot * (delta - pi * sigma)
    gp_dot = gw_dot * pi
    ga = drive * delta + rest * pi
    ga_dot = drive * pi
    gu = (drive * change + rest) * zeta
    gu_dot = drive * zeta
    if MAXIMUM:
        ga -= tl.where(at_maximum, mu * constant / t, 0.0)
        ga_dot -= tl.where(at_maximum, back * constant / t, 0.0)
    return ga, ga_dot, gu, gu_dot, gp, gp_dot


@triton.jit
def activation_second(gw, gw_dot, a, a_dot, u, u_dot, p, p_dot, NORM: tl.constexpr):
    """The same of :func:`activation_tangent`."""
    f, slope, bend = activation_bend(a, NORM)
    f_dot = slope * a_dot
    ga_dot = gw_dot * slope * u * p
    ga = gw * slope * u * p + gw_dot * (bend * a_dot * u * p + slope * (u_dot * p + u * p_dot))
    gp_dot = gw_dot * f * u
    gp = gw * f * u + gw_dot * (f_dot * u + f * u_dot)
    gu_dot = gw_dot * f * p
    gu = gw * f * p + gw_dot * (f_dot * p + f * p_dot)
    return ga, ga_dot, gu, gu_dot, gp, gp_dot
