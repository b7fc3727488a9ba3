"""Second derivatives as training on forces asks for them: kernels against the reference and against recomputation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.chunks import EdgeList
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.edge_degree import EmbeddingSpec, edge_degree_embedding, edge_degree_embedding_reference
from e2former_kernels.equivariant_attention import equivariant_attention, equivariant_attention_reference
from e2former_kernels.equivariant_attention.attention_norm import NORMS as ALL_NORMS
from e2former_kernels.radial.reference import gaussian_basis, radial_hidden, radial_network

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs the triton package")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")
NORMS = [name for name, norm in ALL_NORMS.items() if norm.kernels]


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert not a.isnan().any()
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).detach()) if b.numel() else 0.0


def single(x):
    """Nested arguments in float32."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().float().requires_grad_(x.requires_grad)
    return type(x)(*map(single, x)) if isinstance(x, tuple) else x


def of_forces(
    out: Tensor, first: list[Tensor], inputs: list[Tensor], used: Sequence[int] | None = None
) -> list[Tensor]:
    """Gradients by the cotangent and by ``inputs`` of a function of the gradients of <cotangent, out> by ``first``.

    used: which of those gradients the function reads, all of them by default. A weight among ``first`` has the
    operations recompute: their own second derivatives are of forces.
    """
    random = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)

    cotangent = like(out).requires_grad_()
    gradients = torch.autograd.grad(out, first, cotangent, create_graph=True)
    loss = sum((g * like(g)).sum() for n, g in enumerate(gradients) if used is None or n in used)
    return list(torch.autograd.grad(loss, [cotangent, *inputs], materialize_grads=True))


@pytest.fixture
def called(spy) -> list:
    """Calls of the attention's hand-written second derivative."""
    from e2former_kernels.equivariant_attention import fused

    return spy(fused, "second_derivative")


@pytest.fixture
def check(make, find_leaves, called):
    """Compare with the reference, and with the recomputation that steps without a second derivative go through."""

    def compare(
        arguments: tuple, form: str = "relative", chunk: int | None = 4, used: Sequence[int] = (0, 1, 2, 3)
    ) -> None:
        first, inputs, weight = [arguments[n] for n in (5, 1, 2, 3)], find_leaves(arguments), arguments[7].basis
        op = lambda: equivariant_attention(*make.in_chunks(arguments, chunk), form=form)  # noqa: E731
        ours = of_forces(op(), first, inputs, used)
        assert len(called) == 1 and called[0][1] is not None
        recomputed = of_forces(op(), [*first, weight], inputs, used)
        reference = of_forces(equivariant_attention_reference(*arguments, form=form), first, inputs, used)
        for n, (a, b, c) in enumerate(zip(ours, recomputed, reference, strict=True)):
            assert relative(a, b) < 1e-11, f"input {n} against recomputation"
            assert relative(a, c) < 1e-11, f"input {n} against the reference"
        assert len(called) == 1

    return compare


@interpreted
@pytest.mark.parametrize(("norm", "order"), list(itertools.product(NORMS, [0, 1])))
def test_attention(make, check, norm: str, order: int) -> None:
    check(make.attention(norm=norm, order=order))


@interpreted
def test_a_norm_without_its_branch_is_no_other(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that says ``kernels`` while a formula for them is missing stops in the kernel."""
    monkeypatch.setitem(ALL_NORMS, "mine", replace(ALL_NORMS["sigmoid"], name="mine"))
    with pytest.raises(Exception, match="AssertionError"):
        equivariant_attention(*make.attention(norm="mine"))


@interpreted
@pytest.mark.parametrize("norm", NORMS)
def test_sum_form(make, check, norm: str) -> None:
    check(make.attention(norm=norm), form="sum", chunk=None)


@interpreted
@pytest.mark.parametrize("edges", [0, 1, 37])
def test_numbers_of_edges(make, check, edges: int) -> None:
    check(make.attention(edges=edges, heads=5, per_head=3, lmax=2, norm="molfm"), chunk=None)


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"inverse_distance": "v2"},
        {"inverse_distance": "v2", "order": 1, "norm": "sigmoid"},
        {"envelope": Envelope(3.0, 5, (0.3, 2.5))},
        {"envelope": Envelope(3.0, 5, (0.3, 2.5)), "order": 0},
        {"envelope": Envelope(3.0, 1)},
        {"envelope": Envelope(3.0, 2)},
        {"envelope": Envelope(1.5)},
    ],
)
def test_geometry(make, check, options: dict) -> None:
    check(make.attention(**options))


@interpreted
def test_without_layer_norms(make, check) -> None:
    arguments = list(make.attention())
    arguments[7] = make.radial(1, 6, 4, 5, norms=False)
    check(tuple(arguments))


@interpreted
def test_senders_beyond_the_receivers(make, check) -> None:
    """A rank of a split graph: atoms that send and do not receive."""
    arguments = list(make.attention(edges=9))
    edges, (source, species) = arguments[6], (torch.randint(0, 6, (9,)), torch.randint(0, 4, (6,)))
    arguments[2], arguments[3] = make(6, 3, 2), make(6, 4, 6)
    arguments[6] = EdgeList(source, edges.target, edges.row_ptr, species)
    check(tuple(arguments))


@interpreted
def test_equal_scores_share_the_maximum_with_the_first_edge(make, check) -> None:
    arguments = list(make.attention(norm="molfm"))
    vec = torch.cat([arguments[5][:3], arguments[5][:3], torch.full((1, 3), 4.0).double()])
    arguments[5] = vec.detach().requires_grad_()
    arguments[6].source.zero_()
    check(tuple(arguments), chunk=None)


@interpreted
@pytest.mark.parametrize("used", [[0], [1], [2], [3], [0, 3]])
def test_missing_cotangents(make, check, used: list[int]) -> None:
    check(make.attention(norm="molfm"), used=used)


@interpreted
def test_several_tiles(make, check, several_tiles, as_in_large_graphs) -> None:
    check(make.attention(per_head=3, **several_tiles), chunk=30)


@interpreted
def test_only_what_is_asked_for(make, called) -> None:
    """Each input alone gets what it gets among all."""
    arguments = make.attention()
    for t in arguments[7]:
        t.requires_grad_(False)
    first = [arguments[n] for n in (5, 1, 2, 3)]
    cotangent = torch.ones(4, 4, 6, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(equivariant_attention(*arguments), first, cotangent, create_graph=True)
    loss = sum(g.square().sum() for g in gradients)
    inputs = [cotangent, *first]
    together = torch.autograd.grad(loss, inputs, retain_graph=True)
    for n, t in enumerate(inputs):
        (alone,) = torch.autograd.grad(loss, [t], retain_graph=True)
        assert relative(alone, together[n]) < 1e-14
    again = [list(given[-1]) for given, _ in called]
    assert again == [[0, 1, 2, 3, 4], *([n] for n in range(5))]


@interpreted
def test_weights_among_the_first_derivatives_are_recomputed(make, find_leaves) -> None:
    arguments = make.attention()
    weights = list(arguments[7])
    inputs = find_leaves(arguments)
    ours = of_forces(equivariant_attention(*arguments), weights, inputs)
    reference = of_forces(equivariant_attention_reference(*arguments), weights, inputs)
    assert all(relative(a, b) < 1e-11 for a, b in zip(ours, reference, strict=True))


@interpreted
@pytest.mark.parametrize(
    ("groups", "norms", "last", "tangent", "edges"),
    [
        (1, True, True, True, 7),
        (1, True, True, False, 7),
        (3, True, False, True, 37),
        (2, False, True, True, 5),
        (3, True, False, False, 1),
        (2, True, True, True, 0),
    ],
)
def test_radial_gradients(make, groups: int, norms: bool, last: bool, tangent: bool, edges: int) -> None:
    """Value and tangent of the networks, and the gradients of both, against autograd."""
    from e2former_kernels.radial.network import RadialNetwork

    weights = make.radial(groups, 6, 4, 5, norms)
    species = torch.randint(0, 4, (2, edges))
    distance = (torch.rand(edges).double() * 3.3 + 0.1).requires_grad_()
    change = make(edges)
    network = radial_network if last else radial_hidden
    value = network(gaussian_basis(distance, 3.0, 5), *species, weights)
    grad, grad_change = make(*value.shape), make(*value.shape)
    loss, expected = (grad.detach() * value).sum(), [value]
    if tangent:
        (slope,) = torch.autograd.grad(value, distance, grad_change, create_graph=True)
        loss = loss + (slope * change).sum()
        expected += torch.autograd.grad(loss, grad_change, retain_graph=True)
    leaves = [t for t in (weights if last else weights[:-2]) if t is not None]
    inputs = [distance, *([change] if tangent else []), *leaves]
    reference = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        gradients = RadialNetwork(weights, 3.0, last)
        out, kept = gradients.forward(distance, *species, change if tangent else None)
        both = torch.stack([grad, grad_change]) if tangent else grad[None]
        by_distance, by_change, by_weights = gradients.backward(both, kept, True)
    assert relative(out, torch.stack(expected)) < 1e-12
    ours = [by_distance, *([by_change] if tangent else []), *[t for t in by_weights if t is not None]]
    for a, b in zip(ours, reference, strict=True):
        assert relative(a, b) < 1e-12


@interpreted
@pytest.mark.parametrize(
    ("lmax", "norms", "edges", "chunk", "exponent"),
    [(1, True, 7, None, 5), (2, True, 37, 10, 5), (2, False, 7, 4, 1), (4, True, 7, None, 2), (2, True, 0, None, 5)],
)
def test_edge_degree(
    make, find_leaves, spy, lmax: int, norms: bool, edges: int, chunk: int | None, exponent: int
) -> None:
    from e2former_kernels.edge_degree import op

    calls = spy(op._Embedding, "second")
    spec = EmbeddingSpec(lmax, 5, Envelope(3.0, exponent))
    arguments = (spec, *make.edges(4, edges, chunk), make.radial(lmax + 1, 6, 4, 5, norms))
    first, inputs = [arguments[1]], find_leaves(arguments)
    ours = of_forces(edge_degree_embedding(*arguments), first, inputs)
    assert len(calls) == 1 and calls[0][1] is not None
    recomputed = of_forces(edge_degree_embedding(*arguments), [*first, arguments[3].basis], inputs, used=[0])
    assert len(calls) == 2 and calls[1][1] is None
    reference = of_forces(edge_degree_embedding_reference(*arguments), first, inputs)
    for n, (a, b, c) in enumerate(zip(ours, recomputed, reference, strict=True)):
        assert relative(a, b) < 1e-11, f"input {n} against recomputation"
        assert relative(a, c) < 1e-11, f"input {n} against the reference"


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "order"), list(itertools.product(NORMS, [0, 1])))
def test_gpu(make, find_leaves, called, norm: str, order: int) -> None:
    """Strict float32 against float64: errors within twice the reference's; the same bits twice."""
    torch.set_float32_matmul_precision("highest")
    make.device, sizes = "cuda", {"nodes": 60, "edges": 900, "heads": 16, "width": 8, "basis": 32, "hidden": 16}
    arguments = make.attention(norm=norm, order=order, lmax=2, **sizes)
    _check_on_gpu(equivariant_attention, equivariant_attention_reference, arguments, (5, 1, 2, 3), find_leaves)
    assert len(called) == 2


@pytest.mark.gpu
def test_edge_degree_gpu(make, find_leaves) -> None:
    torch.set_float32_matmul_precision("highest")
    make.device = "cuda"
    arguments = (EmbeddingSpec(2, 32, Envelope(3.0)), *make.edges(50, 700), make.radial(3, 32, 16, 32))
    _check_on_gpu(edge_degree_embedding, edge_degree_embedding_reference, arguments, (1,), find_leaves)


def _check_on_gpu(op, reference, arguments: tuple, first: tuple[int, ...], find_leaves) -> None:
    low = [single(x) for x in arguments]
    exact = of_forces(reference(*arguments), [arguments[n] for n in first], find_leaves(arguments))
    found = [of_forces(f(*low), [low[n] for n in first], find_leaves(low)) for f in (reference, op, op)]
    errors = [[float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(f, exact, strict=True)] for f in found]
    for n, (budget, error) in enumerate(zip(errors[0], errors[1], strict=True)):
        assert error <= 2 * budget + 5e-6, f"input {n}"
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
