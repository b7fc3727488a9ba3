"""Norm, feed-forward, query and key, grouped linear maps: kernels against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.grouped_linear import grouped_linear, so3_linear
from e2former_kernels.feedforward import gated_feedforward, gated_feedforward_reference
from e2former_kernels.norm import equivariant_rms_norm, equivariant_rms_norm_reference
from e2former_kernels.query_key import QueryKeyWeights, query_key, query_key_reference

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)


@interpreted
@pytest.mark.parametrize("nodes", [0, 1, 5])
@pytest.mark.parametrize("shifted", [False, True])
def test_norm(make, compare, nodes: int, shifted: bool) -> None:
    x, weight, bias = make(nodes, 9, 6), make(3, 6), make(6)
    shift = [make(nodes, 6)] if shifted else []
    if nodes:
        compare(
            equivariant_rms_norm(x, weight, bias, *shift),
            equivariant_rms_norm_reference(x, weight, bias, *shift),
            [x, weight, bias, *shift],
        )
    else:
        assert equivariant_rms_norm(x, weight, bias, *shift).shape == x.shape


@interpreted
def test_feedforward(make, compare) -> None:
    c = 6
    shapes = [(5, 9, c), (3, c), (c,), (3, c, c), (c,), (3 * c, c), (3 * c,), (3, c, c), (c,)]
    arguments = [make(*s) for s in shapes]
    op, reference = gated_feedforward(*arguments), gated_feedforward_reference(*arguments)
    compare(op, reference, arguments[:-1])
    assert torch.allclose(*(torch.autograd.grad(x.sum(), arguments[-1])[0] for x in (op, reference)))


@interpreted
def test_query_key(make, compare) -> None:
    g = 5
    shapes = [(3, 4 * g, 6), (2 * g,), (2, g, 3 * g), (2, g), (2, g), (2, g), (2, 8, g), (2, 8)]
    weights = QueryKeyWeights(*(make(*s) for s in shapes))
    h = make(4, 9, 6)
    op, reference = query_key(h, weights), query_key_reference(h, weights)
    compare(op, reference, [h, *weights[:-1]])


@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_grouped_linear(make, compare, nodes: int) -> None:
    rows, inputs = (1, 3, 5), (2, 4, 3)
    weights = [make(3, i) for i in inputs]
    bias = make(3)
    x = make(nodes, sum(r * i for r, i in zip(rows, inputs, strict=True)))
    parts = x.split([r * i for r, i in zip(rows, inputs, strict=True)], 1)
    reference = torch.cat(
        [(p.view(nodes, r, w.shape[1]) @ w.t()).flatten(1) for p, r, w in zip(parts, rows, weights, strict=True)], 1
    )
    reference = torch.cat([reference[:, :3] + bias, reference[:, 3:]], 1)
    op = grouped_linear(x, weights, rows, bias)
    if nodes:
        compare(op, reference, [x, *weights])
        assert torch.allclose(*(torch.autograd.grad(y.sum(), bias)[0] for y in (op, reference)))
    else:
        assert op.shape == reference.shape


def test_so3_linear_under_autocast(make) -> None:
    make.dtype = torch.float32
    x, weight, bias = make(4, 9, 6), make(3, 8, 6), make(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = so3_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert (y.float() - so3_linear(x, weight, bias)).abs().max() < 0.2
