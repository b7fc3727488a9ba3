"""The attention's kernels against the reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.chunks import EdgeList
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.equivariant_attention import equivariant_attention, equivariant_attention_reference
from e2former_kernels.equivariant_attention.attention_norm import NORMS
from e2former_kernels.equivariant_attention.kernels_value import fits

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs the triton package")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")

CASES = [
    *itertools.product(["qk"], [name for name, norm in NORMS.items() if norm.kernels], [0, 1]),
    ("qk_dot", "molfm", 1),
    ("qk_dot_scalar", "smooth", 0),
]


@interpreted
@pytest.mark.parametrize(("score", "norm", "order"), CASES)
def test_equals_the_reference(make, compare, find_leaves, score: str, norm: str, order: int) -> None:
    arguments = make.attention(score, norm, order)
    compare(
        equivariant_attention(*make.in_chunks(arguments, 4)),
        equivariant_attention_reference(*arguments),
        find_leaves(arguments),
    )


@interpreted
@pytest.mark.parametrize("lmax", [2, 3, 4])
def test_degrees(make, compare, find_leaves, lmax: int) -> None:
    arguments = make.attention(lmax=lmax, inverse_distance="v2")
    op, reference = equivariant_attention(*arguments), equivariant_attention_reference(*arguments)
    assert (op - reference).abs().max() < 1e-11
    inputs = find_leaves(arguments[:6])
    cotangent = torch.randn_like(op)
    pairs = zip(
        torch.autograd.grad(op, inputs, cotangent), torch.autograd.grad(reference, inputs, cotangent), strict=True
    )
    assert all((a - b).abs().max() < 1e-10 * b.abs().max().clamp(min=1) for a, b in pairs)


@interpreted
def test_contraction_that_no_program_holds(make, compare, find_leaves) -> None:
    """Order 2 with lmax 4 and cross products has 154 path rows of 8 x 25 numbers: a product of PyTorch's."""
    small = {"nodes": 3, "edges": 5, "heads": 2, "width": 1, "per_head": 1, "basis": 3, "hidden": 3}
    *arguments, coupling = make.attention(order=2, lmax=4, **small)
    arguments.append(make(154, *coupling.shape[1:]).detach())
    assert not fits(arguments[-1].flatten(1)) and not fits(arguments[-1].flatten(1).t())
    op, reference = equivariant_attention(*arguments), equivariant_attention_reference(*arguments)
    compare(op, reference, find_leaves(arguments))
    assert fits(make(90, 128)) and fits(make(94, 200))  # lmax 3, and lmax 4 without cross products


@interpreted
@pytest.mark.parametrize("edges", [0, 1, 37])
def test_numbers_of_edges(make, compare, find_leaves, edges: int) -> None:
    arguments = make.attention(edges=edges, heads=5, per_head=3)
    op, reference = equivariant_attention(*arguments), equivariant_attention_reference(*arguments)
    inputs = find_leaves(arguments)
    cotangent = torch.randn_like(op)
    assert (op - reference).abs().max() < 1e-11
    for a, b in zip(
        torch.autograd.grad(op, inputs, cotangent, create_graph=True),
        torch.autograd.grad(reference, inputs, cotangent, create_graph=True),
        strict=True,
    ):
        assert (a - b).abs().sum() < 1e-9 * b.abs().sum().clamp(min=1)


@interpreted
def test_several_tiles(make, compare, find_leaves, several_tiles, as_in_large_graphs) -> None:
    arguments = make.attention(per_head=3, **several_tiles)
    compare(equivariant_attention(*arguments), equivariant_attention_reference(*arguments), find_leaves(arguments))


@interpreted
def test_gradgradcheck(make) -> None:
    arguments = make.attention("qk", "molfm", 1, nodes=3, edges=3, heads=2, per_head=1)

    def function(query, key, value, vec):
        return equivariant_attention(arguments[0], query, key, value, None, vec, *arguments[6:])

    inputs = tuple(t.detach().requires_grad_() for t in (*arguments[1:4], arguments[5]))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@interpreted
def test_bell_envelope_and_other_options(make, compare, find_leaves) -> None:
    arguments = make.attention(order=0, envelope=Envelope(3.0, 3, (0.3, 2.5)))
    compare(equivariant_attention(*arguments), equivariant_attention_reference(*arguments), find_leaves(arguments))


@interpreted
def test_sum_form_of_any_rows(make, compare, find_leaves) -> None:
    """As ``eaas`` has them, also of images: senders that are no receivers."""
    arguments = list(make.attention(edges=9))
    edges, species = arguments[6], torch.tensor([*arguments[6].species.tolist(), 1, 3])
    edges = EdgeList(torch.randint(0, 6, (9,)), edges.target, edges.row_ptr, species)
    arguments[2], arguments[3], arguments[6] = make(6, 3, 2), make(6, 5, 6), edges
    compare(
        equivariant_attention(*make.in_chunks(arguments, 4), form="sum"),
        equivariant_attention_reference(*arguments, form="sum"),
        find_leaves(arguments),
    )


@interpreted
def test_far_edges_and_ties(make) -> None:
    """Beyond the cutoff the weight is zero; equal scores share the maximum with the first edge."""
    arguments = list(make.attention(norm="molfm"))
    arguments[5] = torch.cat([arguments[5][:3].detach(), arguments[5][:3].detach(), torch.full((1, 3), 4.0).double()])
    arguments[5].requires_grad_()
    arguments[6].source.zero_()
    op, reference = equivariant_attention(*arguments), equivariant_attention_reference(*arguments)
    assert (op - reference).abs().max() < 1e-11
    a, b = (torch.autograd.grad(x.square().sum(), arguments[5])[0] for x in (op, reference))
    assert (a - b).abs().max() < 1e-10 * b.abs().max()


@interpreted
def test_frozen_weights_get_no_gradient_work(make, spy) -> None:
    """Forces alone never differentiate the radial networks by their weights."""
    from e2former_kernels.radial.network import RadialNetwork

    calls = spy(RadialNetwork, "backward")
    arguments = make.attention()
    out = equivariant_attention(*arguments)
    torch.autograd.grad(out.sum(), arguments[5], create_graph=True)
    assert [(given[3], found[2]) for given, found in calls] == [(False, None)]


def change_edges(name: str, change, edges: EdgeList) -> EdgeList:
    index = {n: getattr(edges, n) for n in ("source", "target", "row_ptr", "species")}
    return EdgeList(**index | {name: change(index[name])})


@interpreted
@pytest.mark.parametrize(
    ("position", "change", "error", "name"),
    [
        (1, lambda t: t[:, :1], ValueError, "query"),
        (2, lambda t: t[1:], ValueError, "key"),
        (3, lambda t: t[:, 1:], ValueError, "value"),
        (3, lambda t: t[..., 1:], ValueError, "value"),
        (5, lambda t: t[:, :2], ValueError, "vec"),
        (6, partial(change_edges, "target", lambda t: t[1:]), ValueError, "target"),
        (6, partial(change_edges, "species", lambda t: t[1:]), ValueError, "species"),
        (6, partial(change_edges, "source", lambda t: t.int()), TypeError, "source"),
        (1, lambda t: t.float(), TypeError, "query"),
        (9, lambda t: t[:, :2], ValueError, "coupling"),
        (3, lambda t: t.to("meta"), RuntimeError, "meta"),
        (2, lambda t: t.to("meta"), ValueError, "key"),
        (7, lambda r: r._replace(out=r.out[:, 1:]), ValueError, "radial"),
    ],
)
def test_wrong_arguments_are_named(make, position: int, change, error: type, name: str) -> None:
    arguments = list(make.attention())
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=name):
        equivariant_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("score", "norm", "order"), CASES)
def test_gpu(make, score: str, norm: str, order: int) -> None:
    """Strict float32 against float64: errors within twice the reference's; the same bits twice."""
    torch.set_float32_matmul_precision("highest")
    make.device, sizes = "cuda", {"nodes": 60, "edges": 900, "heads": 16, "width": 8, "basis": 32, "hidden": 16}
    arguments = make.attention(score, norm, order, lmax=2, **sizes)
    single = _single(arguments)
    exact = equivariant_attention_reference(*arguments)
    cotangent = torch.randn_like(exact)
    exact_grads = torch.autograd.grad(exact, [arguments[k] for k in (1, 2, 3, 5)], cotangent)
    errors, results = [], []
    for function in (equivariant_attention_reference, equivariant_attention, equivariant_attention):
        out = function(*single)
        grads = torch.autograd.grad(out, [single[k] for k in (1, 2, 3, 5)], cotangent.float())
        results.append((out, *grads))
        pairs = zip(results[-1], (exact, *exact_grads), strict=True)
        errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    for budget, error in zip(errors[0], errors[1], strict=True):
        assert error <= 2 * budget + 2e-6
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


def _single(arguments):
    def to(x):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.detach().float().requires_grad_(x.requires_grad)
        return type(x)(*map(to, x)) if isinstance(x, tuple) else x

    return [to(x) for x in arguments]


@pytest.mark.gpu
def test_gpu_one_atom_or_edge(make) -> None:
    """Triton makes constants of arguments that are 1: one atom, one edge, and the chunks that leave one over."""
    from e2former_kernels.query_key import QueryKeyWeights, query_key
    from e2former_kernels.radial.splines import build_splines

    make.device, make.dtype = "cuda", torch.float32
    arguments = list(make.attention(nodes=2, edges=1, heads=32, per_head=2))
    out = equivariant_attention(*arguments)
    first = torch.autograd.grad(out.square().sum(), arguments[1:4] + arguments[5:6], create_graph=True)
    sum(g.square().sum() for g in first).backward()
    for tensor in arguments[7]:
        tensor.requires_grad_(False)
    splines = build_splines(arguments[7], 3.0, range(4), tolerance=1e-3)
    again = equivariant_attention(*arguments, splines=splines)
    (grad,) = torch.autograd.grad(again.square().sum(), arguments[5])
    assert (again - out).abs().max() < 1e-2 * out.abs().max() and grad.isfinite().all()
    weights = QueryKeyWeights(
        *(make(*s) for s in [(3, 64, 8), (32,), (2, 16, 48), (2, 16), (2, 16), (2, 16), (2, 32, 16), (2, 32)])
    )
    h = make(1, 9, 8)
    (grad,) = torch.autograd.grad(query_key(h, weights).square().sum(), h, create_graph=True)
    grad.square().sum().backward()
    assert h.grad.isfinite().all() and weights.weight.grad.isfinite().all()
