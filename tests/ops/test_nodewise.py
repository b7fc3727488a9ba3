"""Norm, feed-forward, query and key, grouped linear maps: kernels against plain PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch

from e2former_kernels.common.backend import Mode, triton_installed
from e2former_kernels.feedforward import gated_feedforward, gated_feedforward_reference
from e2former_kernels.layer_norm import equivariant_rms_norm, equivariant_rms_norm_reference
from e2former_kernels.linear import so3_linear
from e2former_kernels.query_key import QueryKeyWeights, query_key, query_key_reference
from e2former_kernels.query_key.op import TILE_NUMBERS

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)


@interpreted
@pytest.mark.parametrize("residual", [False, True])
def test_feedforward(make, compare, residual: bool) -> None:
    c = 6
    shapes = [(5, 9, c), (3, c), (c,), (3, c, c), (c,), (3 * c, c), (3 * c,), (3, c, c), (c,)]
    arguments = [make(*s) for s in shapes]
    op, reference = (f(*arguments, residual=residual) for f in (gated_feedforward, gated_feedforward_reference))
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


def test_so3_linear_under_autocast(make) -> None:
    make.dtype = torch.float32
    x, weight, bias = make(4, 9, 6), make(3, 8, 6), make(8)
    y = so3_linear(x, weight, bias, mode=Mode(autocast=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    terms = so3_linear(x.abs(), weight.abs(), bias.abs())
    assert bool(((y.float() - so3_linear(x, weight, bias)).abs() <= 4 * 2.0**-9 * terms).all()), "a few roundings"


def norm_case(make, wide: bool = False):
    return (
        equivariant_rms_norm,
        equivariant_rms_norm_reference,
        [make(7, 9, 6), make(3, 6), make(6), make(7, 6)],
        (0, 3),
    )


def feedforward_case(make, wide: bool = False):
    c = 6
    shapes = [(7, 9, c), (3, c), (c,), (3, c, c), (c,), (3 * c, c), (3 * c,), (3, c, c), (c,)]
    functions = (functools.partial(f, residual=True) for f in (gated_feedforward, gated_feedforward_reference))
    return *functions, [make(*s) for s in shapes], (0,)


def query_key_case(make, wide: bool = False):
    g = TILE_NUMBERS // 2 + 1 if wide else 5  # a tile has one atom's numbers
    shapes = [(3, 4 * g, 6), (2 * g,), (2, g, 3 * g), (2, g), (2, g), (2, g), (2, 8, g), (2, 8)]
    arguments = [make(7, 9, 6), *(make(*s) for s in shapes)]
    return (
        lambda h, *w: query_key(h, QueryKeyWeights(*w)),
        lambda h, *w: query_key_reference(h, QueryKeyWeights(*w)),
        arguments,
        (0,),
    )


@interpreted
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("case", [norm_case, feedforward_case, query_key_case])
def test_training_on_forces(make, spy, request, case, large: bool) -> None:
    """First derivatives by the nodes' tensors alone, second ones by everything: none of it goes through autograd."""
    from e2former_kernels.common.chunks import Plan

    if large:
        request.getfixturevalue("as_in_large_graphs")
    op, reference, arguments, nodes = case(make, wide=large)
    inputs = [arguments[n] for n in nodes]
    outputs = op(*arguments), reference(*arguments)
    recomputed = spy(Plan, "vjp")
    cotangent = make(*outputs[0].shape)
    directions = [torch.randn(t.shape, dtype=t.dtype) for t in inputs]
    found = []
    for out in outputs:
        first = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
        loss = sum((g * d).sum() for g, d in zip(first, directions, strict=True)) + out.square().sum()
        found.append(torch.autograd.grad(loss, [cotangent, *arguments], allow_unused=True, materialize_grads=True))
    for n, (a, b) in enumerate(zip(*found, strict=True)):
        assert a.shape == b.shape and not a.isnan().any()
        assert (a - b).abs().max() <= 1e-11 * b.abs().max().clamp(min=1e-3), f"input {n}"
    # frozen weights, and a cotangent of one of the gradients only
    frozen = [t if n in nodes else t.detach() for n, t in enumerate(arguments)]
    found = []
    for function in (op, reference):
        first = torch.autograd.grad(function(*frozen), inputs, cotangent, create_graph=True)
        loss = (first[0] * directions[0]).sum()
        found.append(torch.autograd.grad(loss, [cotangent, inputs[0]]))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()
    assert not recomputed


@interpreted
@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
def test_norm_with_some_cotangents(make, used: list[int]) -> None:
    """The loss reads the gradient by the features, by the shift, or both, which were taken together."""
    op, reference, arguments, nodes = norm_case(make)
    inputs = [arguments[n] for n in nodes]
    cotangent, directions = make(*inputs[0].shape), [torch.randn_like(t) for t in inputs]
    found = []
    for function in (op, reference):
        first = torch.autograd.grad(function(*arguments), inputs, cotangent, create_graph=True)
        loss = sum((first[n] * directions[n]).sum() for n in used)
        found.append(torch.autograd.grad(loss, [cotangent, *arguments], allow_unused=True, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max().clamp(min=1e-3)
