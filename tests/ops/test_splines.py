"""Splines of frozen radial networks: their error, and the attention with them."""

from __future__ import annotations

import pytest
import torch

from e2former_kernels.common.backend import Mode, triton_installed
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.edge_degree import EmbeddingSpec, edge_degree_embedding, edge_degree_embedding_reference
from e2former_kernels.equivariant_attention import equivariant_attention, equivariant_attention_reference
from e2former_kernels.radial.reference import RadialWeights, gaussian_basis, radial_network
from e2former_kernels.radial.splines import build_splines, hermite

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
CUTOFF, ELEMENTS = 3.0, [0, 2, 3]


@pytest.mark.parametrize("norms", [True, False])
def test_error_of_splines(make, norms: bool) -> None:
    """At random distances, for every ordered pair: values within twice the tolerance, slopes within a hundred times."""
    weights = make.radial(1, 6, 8, 17, norms)
    splines = build_splines(weights, CUTOFF, ELEMENTS)
    assert splines.error <= 1e-6 and not splines.knots.requires_grad
    distance = (torch.rand(400) * CUTOFF).double().requires_grad_()
    for zi in ELEMENTS:
        for zj in ELEMENTS:
            species = torch.full((400,), zi), torch.full((400,), zj)
            exact = radial_network(gaussian_basis(distance, CUTOFF, 17), *species, weights).squeeze(1)
            t = distance * splines.scale
            k = t.long().clamp(max=splines.intervals - 1)
            row, parts = splines.pair_row[zi, zj] + k, hermite(t - k)
            ends = (splines.knots[row, 0], splines.knots[row, 1], splines.knots[row + 1, 0], splines.knots[row + 1, 1])
            found = sum(p.unsqueeze(1) * e for p, e in zip(parts, ends, strict=True))
            assert (found - exact).abs().max() <= 2e-6 * exact.abs().max()
            for column in range(exact.shape[1]):
                (slope,) = torch.autograd.grad(found[:, column].sum(), distance, retain_graph=True)
                (expected,) = torch.autograd.grad(exact[:, column].sum(), distance, retain_graph=True)
                assert (slope - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert int(splines.pair_row[1, 0]) == -1  # an element that the splines were not made for


def test_no_splines_where_none_are_good_or_small_enough(make) -> None:
    weights = make.radial(1, 6, 8, 17)
    assert build_splines(weights, CUTOFF, ELEMENTS, tolerance=1e-14) is None
    assert build_splines(weights, CUTOFF, ELEMENTS, max_bytes=1000) is None


@interpreted
@pytest.mark.parametrize(
    ("norm", "order", "size"), [("smooth", 1, None), ("molfm", 1, 3), ("softplus", 0, None), ("sigmoid", 1, 3)]
)
def test_attention_with_splines(make, find_leaves, norm: str, order: int, size: int | None) -> None:
    """Value and gradients of query, key, value and edges; second derivatives are the network's."""
    arguments = list(make.attention("qk", norm, order, edges=11, heads=5, basis=9))
    for tensor in find_leaves(arguments[7]):
        tensor.requires_grad_(False)
    with torch.no_grad():  # edges around the atoms of the cutoff sphere
        arguments[5].mul_(0.8)
    splines = build_splines(arguments[7], 3.0, range(4), tolerance=1e-9)
    op = equivariant_attention(*make.in_chunks(arguments, size), splines=splines)
    reference = equivariant_attention_reference(*arguments)
    inputs = find_leaves(arguments)
    inside = arguments[5].detach().norm(dim=1) < 3.0
    assert inside.any()
    assert (op - reference).abs().max() < 1e-8 * reference.abs().max()
    cotangent = torch.randn_like(op)
    first = torch.autograd.grad(op, inputs, cotangent, create_graph=True)
    expected = torch.autograd.grad(reference, inputs, cotangent, create_graph=True)
    for a, b in zip(first, expected, strict=True):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()
    weights = [torch.randn_like(g) for g in first]
    second, expected = (
        torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), inputs)
        for grads in (first, expected)
    )
    for a, b in zip(second, expected, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


@interpreted
@pytest.mark.parametrize(("lmax", "norms", "size"), [(2, True, None), (1, False, 3)])
def test_edge_degree_with_splines(make, lmax: int, norms: bool, size: int | None) -> None:
    """Several networks without their last layer: value and gradient by the edges, and by the last layer's weights."""
    vec, edges = make.edges(4, 11, size)
    radial = make.radial(lmax + 1, 6, 5, 9, norms)
    hidden = type(radial)(*(None if t is None else t.detach() for t in radial[:-2]), *radial[-2:])
    splines = build_splines(hidden, CUTOFF, range(4), last=False, tolerance=1e-9)
    arguments = (EmbeddingSpec(lmax, 9, Envelope(CUTOFF)), vec, edges, hidden)
    op = edge_degree_embedding(*arguments, splines=splines)
    reference = edge_degree_embedding_reference(*arguments)
    assert (op - reference).abs().max() < 1e-8 * reference.abs().max()
    cotangent = torch.randn(op.shape, dtype=op.dtype)
    inputs = [vec, hidden.out, hidden.out_bias]
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (op, reference)), strict=True):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


def with_splines(case, name: str) -> dict:
    """The operation's tensors with frozen radial networks and their splines."""
    tensors = {n: t.detach() if n.startswith("radial") else t for n, t in case.tensors.items()}
    weights = RadialWeights(*(tensors.get(f"radial.{n}") for n in RadialWeights._fields))
    return tensors | {"splines": build_splines(weights, CUTOFF, range(4), name == "attention", tolerance=1e-7)}


def value_and_gradients(run, tensors: dict) -> list[torch.Tensor]:
    inputs = [t for t in tensors.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    out = run(tensors)
    random = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=random, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@interpreted
@pytest.mark.parametrize("edges", [0, 1, 37])
@pytest.mark.parametrize("name", ["attention", "edge_degree"])
def test_numbers_of_edges(operation, name: str, edges: int) -> None:
    case = operation(name, size=edges, lmax=1)
    tensors = with_splines(case, name)
    without = {n: t for n, t in tensors.items() if n != "splines"}
    found = value_and_gradients(case.run, tensors), value_and_gradients(case.reference, without)
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        if b.numel():
            assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-3)


@interpreted
@pytest.mark.parametrize("name", ["attention", "edge_degree"])
def test_strided_inputs(operation, name: str) -> None:
    """Every tensor with gaps between its numbers, which hold NaN, or an index that does not exist."""

    def strided(t: torch.Tensor) -> torch.Tensor:
        gap = torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, 1 << 40)
        return torch.stack([t, gap], -1)[..., 0].detach().requires_grad_(t.requires_grad)

    case = operation(name, lmax=1)
    tensors = with_splines(case, name)
    gaps = {n: strided(t) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    for a, b in zip(*(value_and_gradients(case.run, t) for t in (tensors, gaps)), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_splines_that_do_not_belong_are_named(make) -> None:
    arguments = list(make.attention())
    splines = build_splines(arguments[7], 3.0, range(4))
    with pytest.raises(ValueError, match="splines: expected None where the radial network's weights are trained"):
        equivariant_attention(*arguments, splines=splines, mode=Mode(trained=True))
    for tensor in arguments[7]:
        tensor.requires_grad_(False)
    with pytest.raises(ValueError, match="splines.knots"):
        equivariant_attention(*arguments, splines=splines._replace(knots=splines.knots[..., 1:]))
    with pytest.raises(TypeError, match="splines.knots"):
        equivariant_attention(*arguments, splines=splines._replace(knots=splines.knots.float()))
    for name in ("knots", "pair_row"):
        gaps = torch.stack([getattr(splines, name)] * 2, -1)[..., 0]
        with pytest.raises(ValueError, match=rf"splines.{name}: expected a contiguous tensor, got strides"):
            equivariant_attention(*arguments, splines=splines._replace(**{name: gaps}))
