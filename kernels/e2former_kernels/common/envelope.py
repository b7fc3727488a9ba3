"""Cutoff envelopes: value, first and second derivative, in PyTorch and for Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from e2former_kernels.common.tiles import tl, triton


def polynomial_envelope(distance: Tensor, cutoff: float, exponent: int) -> Tensor:
    r"""DimeNet's polynomial cutoff (arXiv:2003.03123) factorised (docs/network.md, equation 3.2).

    :math:`u = (1-\rho)^3 \sum_{k<p} \frac{(k+1)(k+2)}{2} \rho^k`, :math:`\rho = d / r_c`, zero for :math:`\rho \ge 1`.
    It equals :math:`1 - \frac{(p+1)(p+2)}{2}\rho^p + p(p+2)\rho^{p+1} - \frac{p(p+1)}{2}\rho^{p+2}`, which loses
    all its digits near the cutoff; the product does not.

    distance: any shape, and cutoff r_c, Å; exponent: p, at least 1. Returns values in [0, 1], no unit.
    """
    return _Polynomial.apply(distance / cutoff, exponent)


class _Polynomial(torch.autograd.Function):
    r"""The envelope as a function of rho. Its derivative is a single product, which autograd cannot see:
    :math:`u' = -\frac{p(p+1)(p+2)}{2} \rho^{p-1} (1-\rho)^2` (docs/network.md, equation 3.3)."""

    @staticmethod
    def forward(ctx, rho: Tensor, exponent: int) -> Tensor:
        ctx.exponent = exponent
        ctx.save_for_backward(rho)
        series: Tensor | float = (exponent * (exponent + 1)) / 2
        for k in range(exponent - 2, -1, -1):
            series = series * rho + ((k + 1) * (k + 2)) / 2
        gap = (1.0 - rho).clamp(min=0.0)
        return gap * gap * gap * series

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rho,), p = ctx.saved_tensors, ctx.exponent
        gap = (1.0 - rho).clamp(min=0.0)
        return grad * (-0.5 * p * (p + 1) * (p + 2)) * rho ** (p - 1) * gap.square(), None


def bell_envelope(distance: Tensor, lower: float, upper: float) -> Tensor:
    r""":math:`(1-t^2)^2` with :math:`t = (2d - d_0 - d_1)/(d_1 - d_0)`, zero outside [d_0, d_1].

    docs/network.md, equation 3.4. distance: any shape, d_0 and d_1, Å. Returns values in [0, 1], no unit.
    """
    t = (2.0 * distance - (lower + upper)) / (upper - lower)
    gap = (1.0 - t * t).clamp(min=0.0)
    return gap * gap


@dataclass(frozen=True)
class Envelope:
    """One envelope: what the network, its specifications and the kernels' arguments know of it.

    cutoff: Å; the radial basis ends there too. exponent: p of the polynomial. bell: (lower, upper), Å: a bell between
    these two in place of the polynomial.
    """

    cutoff: float
    exponent: int = 5
    bell: tuple[float, float] | None = None

    def __call__(self, distance: Tensor) -> Tensor:
        """:func:`polynomial_envelope` or :func:`bell_envelope`."""
        if self.bell is None:
            return polynomial_envelope(distance, self.cutoff, self.exponent)
        return bell_envelope(distance, *self.bell)

    @cached_property
    def arguments(self) -> dict[str, float | tuple]:
        """For kernels that call :func:`envelope_of`, :func:`envelope_bend`: (exponent, bell or not) and radii."""
        lower, upper = (0.0, self.cutoff) if self.bell is None else self.bell
        return {"lower": float(lower), "upper": float(upper), "ENVELOPE": (self.exponent, self.bell is not None)}

    @property
    def numbers(self) -> list[float]:
        """All of it as numbers, for :meth:`of`."""
        return [float(x) for x in (self.cutoff, self.exponent, *(self.bell or ()))]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Envelope:
        """The inverse of :attr:`numbers`."""
        cutoff, exponent, *bell = numbers
        return cls(cutoff, int(exponent), tuple(bell) if bell else None)


@triton.jit
def polynomial(d, cutoff, P: tl.constexpr):
    """Value and derivative by the distance of :func:`polynomial_envelope`."""
    rho = d / cutoff
    series = 0.0 * rho + P * (P + 1) / 2
    slope = 0.0 * rho
    for n in tl.static_range(P - 1):
        slope = slope * rho + series
        series = series * rho + (P - 1 - n) * (P - n) / 2
    gap = tl.maximum(1.0 - rho, 0.0)
    return gap * gap * gap * series, gap * gap * (gap * slope - 3.0 * series) / cutoff


@triton.jit
def polynomial_bend(d, cutoff, P: tl.constexpr):
    """Second derivative of :func:`polynomial` by the distance."""
    rho = d / cutoff
    gap = tl.maximum(1.0 - rho, 0.0)
    if P == 1:
        bend = 2.0 * gap
    else:
        bend = gap * (2.0 * rho - (P - 1) * gap)
        for _n in tl.static_range(P - 2):
            bend *= rho
    return bend * (0.5 * P * (P + 1) * (P + 2)) / (cutoff * cutoff)


@triton.jit
def _bell(d, lower, upper):
    t = (2.0 * d - (lower + upper)) / (upper - lower)
    gap = tl.maximum(1.0 - t * t, 0.0)
    return gap * gap, -8.0 * gap * t / (upper - lower)


@triton.jit
def envelope_of(d, lower, upper, ENVELOPE: tl.constexpr):
    """The envelope and its derivative; arguments of :attr:`Envelope.arguments`."""
    if ENVELOPE[1]:
        u, du = _bell(d, lower, upper)
    else:
        u, du = polynomial(d, upper, ENVELOPE[0])
    return u, du


@triton.jit
def envelope_bend(d, lower, upper, ENVELOPE: tl.constexpr):
    """Second derivative of the envelope by the distance."""
    if ENVELOPE[1]:
        t = (2.0 * d - (lower + upper)) / (upper - lower)
        gap = 1.0 - t * t
        bend = tl.where(gap > 0.0, (2.0 * t * t - gap) * (16.0 / ((upper - lower) * (upper - lower))), 0.0)
    else:
        bend = polynomial_bend(d, upper, ENVELOPE[0])
    return bend
