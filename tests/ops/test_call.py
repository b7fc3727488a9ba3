"""Steps: passes that take first and second derivatives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from e2former_kernels.common.backend import Mode, triton_installed
from e2former_kernels.layer_norm import equivariant_rms_norm, equivariant_rms_norm_reference
from e2former_kernels.linear import grouped_linear, so3_linear

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)


def norm(make):
    return equivariant_rms_norm, equivariant_rms_norm_reference, [make(5, 4, 6), make(2, 6), make(6)]


def so3(make):
    def reference(x, weight, bias):
        return torch.cat([F.linear(x[:, :1], weight[0], bias), F.linear(x[:, 1:], weight[1])], 1)

    return partial(so3_linear, mode=Mode(trained=True)), reference, [make(5, 4, 6), make(2, 3, 6), make(3)]


def grouped(make):
    def op(x, first, second, bias):
        return grouped_linear(x, [first, second], (1, 3), bias, Mode(trained=True))

    def reference(x, first, second, bias):
        parts = [F.linear(x[:, :6], first, bias), *(F.linear(y, second) for y in x[:, 6:].split(8, 1))]
        return torch.cat(parts, 1)

    return op, reference, [make(5, 30), make(4, 6), make(4, 8), make(4)]


@interpreted
@pytest.mark.parametrize("case", [norm, so3, grouped])
@pytest.mark.parametrize("bent", [True, False])  # the first derivative may come before the second where it is not
def test_passes_of_both_derivatives_add_up(make, case, bent: bool) -> None:
    op, reference, inputs = case(make)

    def losses(function) -> tuple[torch.Tensor, torch.Tensor]:
        y = function(*inputs)
        (slope,) = torch.autograd.grad(y.sin().sum() if bent else y[:, :2].sum(), inputs[0], create_graph=True)
        return y.square().sum(), slope.square().sum()

    def gradients(*losses: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(sum(losses), inputs, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

    ours, theirs = losses(op), losses(reference)
    together = gradients(*ours)
    # once more, each alone, and together again: nothing is left from a pass for another
    for a in ([ours[0]], [ours[1]], ours):
        expected = gradients(*(theirs[n] for n, t in enumerate(ours) if any(t is x for x in a)))
        for g, e in zip(gradients(*a), expected, strict=True):
            torch.testing.assert_close(g, e)
    assert all(torch.equal(a, b) for a, b in zip(together, gradients(*ours), strict=True))
