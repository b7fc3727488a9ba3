"""The scores ``qk_dot`` and ``qk_dot_scalar`` with fused kernels: value, first and second derivatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.chunks import Plan
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.common.harmonics import solid_harmonics
from e2former_kernels.equivariant_attention import equivariant_attention, equivariant_attention_reference
from e2former_kernels.equivariant_attention.attention_norm import NORMS as ALL_NORMS
from e2former_kernels.equivariant_attention.score import SCORES as ALL_SCORES

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs the triton package")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")
SCORES = [name for name, score in ALL_SCORES.items() if score.directional and score.kernels]
NORMS = [name for name, norm in ALL_NORMS.items() if norm.kernels]
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
MOVING = (5, 1, 2, 3, 4)  # vec, query, key, value, dot


def frozen(x):
    """The arguments with weights that need no gradients."""
    if isinstance(x, Tensor):
        return x.detach()
    return type(x)(*map(frozen, x)) if isinstance(x, tuple) else x


def freeze(arguments: tuple) -> list:
    return [a if n in MOVING else frozen(a) if n in (7, 8) else a for n, a in enumerate(arguments)]


def of_moving(out: Tensor, arguments: list, cotangent: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, [arguments[n] for n in MOVING], cotangent, materialize_grads=True)]


def of_training(out: Tensor, arguments: Sequence, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of <random, out> by inputs, and of a function of its gradients by the moving ones."""
    random = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)

    cotangent = like(out).requires_grad_()
    first = torch.autograd.grad(out, inputs, cotangent, retain_graph=True, materialize_grads=True)
    forces = torch.autograd.grad(out, [arguments[n] for n in MOVING], cotangent, create_graph=True)
    loss = sum((f * like(f)).sum() for f in forces)
    return [*first, *torch.autograd.grad(loss, [cotangent, *inputs], materialize_grads=True)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and not a.isnan().any()
        assert not b.numel() or (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), f"result {n}"


@pytest.fixture
def recomputed(spy) -> list:
    """One entry for every evaluation of differentiable pieces."""
    return spy(Plan, "values")


@interpreted
def test_a_score_without_kernels_is_refused(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry is all that the definition needs of a score; kernels compute none that they do not know."""
    monkeypatch.setitem(ALL_SCORES, "mine", ALL_SCORES["qk"]._replace(kernels=False))
    arguments = make.attention("qk")
    mine = replace(arguments[0], score="mine"), *arguments[1:]
    assert torch.equal(equivariant_attention_reference(*mine), equivariant_attention_reference(*arguments))
    with pytest.raises(ValueError, match="score: the kernels compute qk, qk_dot, qk_dot_scalar, got 'mine'"):
        equivariant_attention(*mine)


@interpreted
def test_kernels_of_qk_stand_for_no_other_score(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score without directions that says ``kernels`` while they compute the gate of ``qk`` is refused."""
    qk = ALL_SCORES["qk"]
    monkeypatch.setitem(ALL_SCORES, "mine", qk._replace(gate_and_head=lambda *given: qk.gate_and_head(*given)[::-1]))
    arguments = make.attention("qk")
    with pytest.raises(ValueError, match="score: without directions the kernels compute .* not those of 'mine'"):
        equivariant_attention(replace(arguments[0], score="mine"), *arguments[1:])


@interpreted
@pytest.mark.parametrize(
    ("score", "norm", "order", "lmax"),
    [  # degrees in turn: each meets every score, norm and order
        (score, norm, order, 1 + (s + n + order) % 3)
        for (s, score), (n, norm), order in itertools.product(enumerate(SCORES), enumerate(NORMS), [0, 1])
    ],
)
def test_frozen_weights(make, recomputed, score: str, norm: str, order: int, lmax: int) -> None:
    arguments = freeze(make.attention(score, norm, order, lmax=lmax))
    reference = equivariant_attention_reference(*arguments, recompute=False)
    cotangent = torch.randn_like(reference)
    expected = of_moving(reference, arguments, cotangent)
    for chunk in (None, 3):
        assert_close(
            of_moving(equivariant_attention(*make.in_chunks(arguments, chunk)), arguments, cotangent), expected
        )
    assert not recomputed


@interpreted
@pytest.mark.parametrize("edges", [0, 1, 37])
@pytest.mark.parametrize("score", SCORES)
def test_numbers_of_edges(make, recomputed, score: str, edges: int) -> None:
    arguments = freeze(make.attention(score, edges=edges, heads=5, per_head=3, lmax=2, inverse_distance="v2"))
    reference = equivariant_attention_reference(*arguments, recompute=False)
    cotangent = torch.randn_like(reference)
    expected = of_moving(reference, arguments, cotangent)
    assert_close(of_moving(equivariant_attention(*arguments), arguments, cotangent), expected)
    assert not recomputed


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_several_tiles(make, find_leaves, several_tiles, as_in_large_graphs, score: str) -> None:
    arguments = make.attention(score, per_head=1, **several_tiles)
    weights_fixed = freeze(arguments)
    reference = equivariant_attention_reference(*weights_fixed, recompute=False)
    cotangent = torch.randn_like(reference)
    expected = of_moving(reference, weights_fixed, cotangent)
    assert_close(of_moving(equivariant_attention(*weights_fixed), weights_fixed, cotangent), expected)
    both = (
        of_training(function(*arguments), arguments, find_leaves(arguments))
        for function in (equivariant_attention, equivariant_attention_reference)
    )
    assert_close(*both)


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_same_bits_twice(make, score: str) -> None:
    arguments = freeze(make.attention(score, lmax=2))
    cotangent = torch.randn_like(equivariant_attention(*arguments))
    a, b = (of_moving(equivariant_attention(*arguments), arguments, cotangent) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def single_precision(x):
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().float().requires_grad_(x.requires_grad)
    return type(x)(*map(single_precision, x)) if isinstance(x, tuple) else x


@interpreted
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_single_precision(make, spy, score: str, half: bool) -> None:
    """With ``half`` the rows of atoms that edges gather are float16, as for score ``qk``."""
    from e2former_kernels.equivariant_attention import fused

    asked = spy(fused, "half_rows")
    arguments = freeze(make.attention(score, lmax=2, edges=37))
    exact = equivariant_attention_reference(*arguments, recompute=False)
    cotangent = torch.randn_like(exact)
    exact = of_moving(exact, arguments, cotangent)
    single = [single_precision(a) for a in arguments]
    found = of_moving(equivariant_attention(*single, half=half), single, cotangent.float())
    for ours, truth in zip(found, exact, strict=True):
        assert (ours.double() - truth).norm() <= (5e-3 if half else 2e-5) * truth.norm()
    assert bool(asked) is half


@interpreted
@pytest.mark.parametrize(
    ("norm", "order", "lmax", "chunk"),
    [
        (norm, order, 1 + (3 * n + 2 - 2 * order) % 4, 4 if (n + order) % 2 else None)
        for (n, norm), order in itertools.product(enumerate(NORMS), [1, 0])
    ],
)
@pytest.mark.parametrize("score", SCORES)
def test_training(
    make, find_leaves, recomputed, score: str, norm: str, order: int, lmax: int, chunk: int | None
) -> None:
    """Gradients by everything, and of a function of the moving inputs' gradients, in one chunk and in several."""
    arguments = make.attention(score, norm, order, lmax=lmax)
    inputs = find_leaves(arguments)
    expected = of_training(equivariant_attention_reference(*arguments, recompute=False), arguments, inputs)
    assert_close(of_training(equivariant_attention(*make.in_chunks(arguments, chunk)), arguments, inputs), expected)
    assert not recomputed


@interpreted
@pytest.mark.parametrize("edges", [0, 1, 37])
@pytest.mark.parametrize("score", SCORES)
def test_training_with_numbers_of_edges(make, find_leaves, recomputed, score: str, edges: int) -> None:
    arguments = make.attention(score, edges=edges, heads=5, per_head=3, lmax=2, inverse_distance="v2")
    inputs = find_leaves(arguments)
    expected = of_training(equivariant_attention_reference(*arguments, recompute=False), arguments, inputs)
    assert_close(of_training(equivariant_attention(*make.in_chunks(arguments, 20)), arguments, inputs), expected)
    assert not recomputed


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_training_the_same_bits_twice(make, find_leaves, score: str) -> None:
    arguments = make.attention(score, lmax=2)
    inputs = find_leaves(arguments)
    a, b = (of_training(equivariant_attention(*make.in_chunks(arguments, 4)), arguments, inputs) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_without_layer_norms(make, find_leaves, score: str) -> None:
    arguments = list(make.attention(score, lmax=2))
    arguments[7] = make.radial(1, 3 * ALL_SCORES[score].outputs, 4, 5, norms=False)
    inputs = find_leaves(arguments)
    expected = of_training(equivariant_attention_reference(*arguments, recompute=False), arguments, inputs)
    assert_close(of_training(equivariant_attention(*arguments), arguments, inputs), expected)


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_hessian(make, recomputed, score: str) -> None:
    """Forces differentiated again by vectors and by the atoms' tensors, each alone too."""
    arguments = freeze(make.attention(score, "molfm", lmax=2))
    rows, inputs = [], [arguments[n] for n in MOVING]
    for function in (equivariant_attention, equivariant_attention_reference):
        out = function(*arguments, **({} if function is equivariant_attention else {"recompute": False}))
        (forces,) = torch.autograd.grad(out.square().sum(), arguments[5], create_graph=True)
        together = torch.autograd.grad(forces[2, 1], inputs, retain_graph=True)
        for t, expected in zip(inputs, together, strict=True):
            (alone,) = torch.autograd.grad(forces[2, 1], [t], retain_graph=True)
            assert_close([alone], [expected], 1e-13)
        rows.append([forces, *together])
    assert not recomputed
    assert_close(*rows)


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_weights_among_the_first_derivatives_are_recomputed(make, find_leaves, recomputed, score: str) -> None:
    arguments = make.attention(score, lmax=2)
    inputs, rows = find_leaves(arguments), []
    for function in (equivariant_attention, equivariant_attention_reference):
        out = function(*arguments)
        (slope,) = torch.autograd.grad(out.square().sum(), arguments[8].bias, create_graph=True)
        rows.append(list(torch.autograd.grad(slope[1], inputs, materialize_grads=True)))
    assert recomputed
    assert_close(*rows)


@interpreted
@pytest.mark.parametrize("score", SCORES)
def test_third_derivative_is_recomputed(make, recomputed, score: str) -> None:
    arguments, rows = freeze(make.attention(score, lmax=2)), []
    for function in (equivariant_attention, equivariant_attention_reference):
        x = function(*arguments).square().sum()
        for row in range(2):
            x = torch.autograd.grad(x, arguments[5], create_graph=True)[0][row, 1]
        rows.append(list(torch.autograd.grad(x, [arguments[n] for n in MOVING])))
    assert recomputed
    assert_close(*rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lmax", [1, 2, 3, 4])
@pytest.mark.parametrize("unit", [True, False])
def test_harmonics(make, lmax: int, unit: bool, device: str) -> None:
    """The kernel's harmonics and their derivative against PyTorch."""
    from e2former_kernels.common.harmonics import harmonic_scales
    from e2former_kernels.equivariant_attention import kernels_directional as kernel

    if device == "cuda":
        make.device, make.dtype = device, torch.float32
    for edges in (1, 37):
        vec, rows = make(edges, 3), (lmax + 1) ** 2
        expected = solid_harmonics(vec / vec.norm(dim=-1, keepdim=True) if unit else vec, lmax)
        expected = expected / (4 * torch.pi) ** 0.5 if unit else expected
        scales, out = (
            harmonic_scales(lmax, math.sqrt(4 * math.pi) if unit else 1.0, vec.dtype, vec.device),
            vec.new_empty(edges, rows),
        )
        grid, constants = (1,), {"E": edges, "L": lmax, "UNIT": unit, "BLOCK": 128}
        kernel.harmonics_kernel[grid](vec.detach(), vec.detach(), scales, out, TANGENT=False, **constants)
        grads, given = make(3, edges, rows).detach(), make(edges, 3).detach()
        found = given.clone()
        kernel.harmonics_backward_kernel[grid](grads, vec.detach(), scales, found, S=3, **constants)
        (slope,) = torch.autograd.grad(expected, vec, grads.sum(0))
        assert_close([out, found], [expected.detach(), given + slope], 1e-12 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lmax", [1, 2, 3, 4])
@pytest.mark.parametrize("unit", [True, False])
def test_harmonics_with_tangents(make, lmax: int, unit: bool, device: str) -> None:
    """The harmonics' change along a change of the vectors, and the gradient of both, against PyTorch."""
    from e2former_kernels.common.harmonics import harmonic_scales
    from e2former_kernels.equivariant_attention import kernels_directional as kernel

    def harmonics(vec: Tensor) -> Tensor:
        y = solid_harmonics(vec / vec.norm(dim=-1, keepdim=True) if unit else vec, lmax)
        return y / (4 * torch.pi) ** 0.5 if unit else y

    if device == "cuda":
        make.device, make.dtype = device, torch.float32
    for edges in (1, 37):
        vec, change, rows = make(edges, 3), make(edges, 3).detach(), (lmax + 1) ** 2
        expected = torch.stack(torch.autograd.functional.jvp(harmonics, vec, change, create_graph=True))
        grads, given = make(3, 2, edges, rows).detach(), make(edges, 3).detach()
        (slope,) = torch.autograd.grad(expected, vec, grads.sum(0))
        scales, out, found = (
            harmonic_scales(lmax, math.sqrt(4 * math.pi) if unit else 1.0, vec.dtype, vec.device),
            torch.empty_like(grads[0]),
            given.clone(),
        )
        grid, constants = (1,), {"E": edges, "L": lmax, "UNIT": unit, "BLOCK": 128}
        kernel.harmonics_kernel[grid](vec.detach(), change, scales, out, TANGENT=True, **constants)
        kernel.harmonics_second_kernel[grid](grads, vec.detach(), change, scales, found, S=3, **constants)
        assert_close([out, found], [expected.detach(), given + slope], 1e-12 if device == "cpu" else 1e-4)


WIDE = {"lmax": 2, "nodes": 60, "heads": 32, "width": 8, "basis": 32, "hidden": 16, "envelope": Envelope(6.0)}
DRAWS = 8


@pytest.fixture
def precise() -> Iterator[Callable[[str], None]]:
    """Set the precision of float32 products for one test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Norm of the error of each tensor over its norm."""
    pairs = zip(found, exact, strict=True)
    return torch.stack([((a.double() - b).norm() / b.norm().clamp(min=1e-6)).detach() for a, b in pairs])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("edges", [1, 900])
@pytest.mark.parametrize("score", SCORES)
def test_gpu(make, precise, score: str, edges: int, precision: str) -> None:
    """Errors within twice those of the reference in the same precision, and two roundings; the same bits twice.

    Root mean squares over draws of the inputs: of one edge, a reference that happens to round well is surpassed
    fivefold now and then, by an operation whose errors are on the average the same.
    """
    make.device = "cuda"
    errors = []
    for _ in range(DRAWS):
        arguments = freeze(make.attention(score, edges=edges, **WIDE))
        precise("highest")
        exact = equivariant_attention_reference(*arguments, recompute=False)
        cotangent = torch.randn_like(exact)
        exact = of_moving(exact, arguments, cotangent)
        single = [single_precision(a) for a in arguments]
        precise(precision)
        functions = equivariant_attention_reference, equivariant_attention, equivariant_attention
        reference, ours, again = (of_moving(f(*single), single, cotangent.float()) for f in functions)
        assert all(torch.equal(*pair) for pair in zip(ours, again, strict=True))
        errors.append(torch.stack([relative_errors(x, exact) for x in (reference, ours)]))
    budget, error = torch.stack(errors).square().mean(0).sqrt()
    roundings = 2 * (1e-6 if precision == "highest" else 2.0**-11)
    assert (error <= 2 * budget + roundings).all(), (error, budget)


@pytest.mark.gpu
@pytest.mark.parametrize("edges", [1, 900])
@pytest.mark.parametrize("score", SCORES)
def test_gpu_training(make, find_leaves, precise, score: str, edges: int) -> None:
    """Gradients of weights and second derivatives in strict float32, as in :func:`test_gpu`."""
    make.device, errors = "cuda", []
    precise("highest")
    for _ in range(DRAWS if edges == 1 else 1):
        arguments = make.attention(score, edges=edges, **WIDE)
        exact = of_training(equivariant_attention_reference(*arguments), arguments, find_leaves(arguments))
        single = [single_precision(a) for a in arguments]
        functions = equivariant_attention_reference, equivariant_attention, equivariant_attention
        reference, ours, again = (of_training(f(*single), single, find_leaves(single)) for f in functions)
        assert all(torch.equal(*pair) for pair in zip(ours, again, strict=True))
        errors.append(torch.stack([relative_errors(x, exact) for x in (reference, ours)]))
    budget, error = torch.stack(errors).square().mean(0).sqrt()
    assert (error <= 2 * budget + 5e-6).all(), (error, budget)
