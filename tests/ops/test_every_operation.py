"""What every operation promises, whatever it computes: odd sizes, strides, refusals, precision, frozen weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.equivariant_attention.attention_norm import NORMS as ALL_NORMS
from e2former_kernels.equivariant_attention.message import DIRECTIONS, INVERSE_DISTANCES
from e2former_kernels.equivariant_attention.score import SCORES as ALL_SCORES

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs the triton package")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")
ON_NODES = ["norm", "feedforward", "feedforward_power", "query_key", "grouped_linear", "so3_linear"]
KERNELS = ["attention", "edge_degree", "norm", "feedforward", "feedforward_power", "query_key"]
SCORES = [f"attention{name.removeprefix('qk')}" for name, score in ALL_SCORES.items() if score.kernels]
ALL = [*SCORES, "edge_degree", *ON_NODES]
PREFIXES = ["radial.", "dot_weights.radial."]
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


EDGES = {"size": 37, "hidden": 8, "basis": 32}
SMALL = {
    "attention": EDGES | {"heads": 4},
    "edge_degree": EDGES,
    "norm": {},
    "feedforward": {},
    "feedforward_power": {},
    "query_key": {},
}
NODES = {"size": 100, "channels": 64}
WIDE = {
    "attention": {"size": 900, "nodes": 60, "heads": 16, "width": 8, "basis": 32, "hidden": 16, "lmax": 2},
    "edge_degree": {"size": 900, "nodes": 60, "width": 32, "basis": 32, "hidden": 16},
    "norm": NODES,
    "feedforward": NODES,
    "feedforward_power": NODES,
    "query_key": NODES | {"width": 32},
}


@pytest.fixture
def precise() -> Iterator[Callable[[str], None]]:
    """Set the precision of float32 products for one test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def derivatives(function: Callable, tensors: dict[str, Tensor], moving: tuple[str, ...]) -> dict[str, Tensor]:
    """Value, all gradients of <random, value>, and all gradients of a function of the moving inputs' gradients."""
    random = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)

    inputs = {n: t for n, t in tensors.items() if t.requires_grad}
    out = function(tensors)
    cotangent = like(out)
    first = torch.autograd.grad(out, list(inputs.values()), cotangent, retain_graph=True, materialize_grads=True)
    forces = torch.autograd.grad(out, [tensors[n] for n in moving], cotangent, create_graph=True)
    loss = sum((g * like(g)).sum() for g in forces)
    second = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    found = {"value": out.detach()}
    for kind, gradients in (("gradient by", first), ("second derivative by", second)):
        found |= {f"{kind} {n}": g for n, g in zip(inputs, gradients, strict=True)}
    return found


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and not a.isnan().any()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) if b.numel() else 0.0


def assert_equal(ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, expected in reference.items():
        assert largest_difference(ours[name], expected) <= tolerance, name


def test_memory_is_poisoned() -> None:
    """The other tests of this folder would see a number that nobody wrote."""
    x = torch.ones(3)
    for fresh in (torch.empty(3), x.new_empty(2), torch.empty_like(x), torch.empty_strided((2,), (1,))):
        assert fresh.isnan().all()


@interpreted
@pytest.mark.parametrize("size", [0, 1, 37])
@pytest.mark.parametrize("name", ON_NODES)
def test_numbers_of_atoms(operation, name: str, size: int) -> None:
    case = operation(name, size=size)
    assert_equal(*(derivatives(f, case.tensors, case.moving) for f in (case.run, case.reference)))


@interpreted
@pytest.mark.parametrize("name", ALL)
def test_strided_inputs(operation, name: str) -> None:
    """Every tensor with gaps between its numbers, which hold NaN, or an index that does not exist."""

    def strided(t: Tensor) -> Tensor:
        gap = torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, 1 << 40)
        return torch.stack([t, gap], -1)[..., 0]

    case = operation(name)
    tensors = case.change(strided)
    assert not any(t.is_contiguous() for t in tensors.values())
    assert_equal(*(derivatives(case.run, t, case.moving) for t in (tensors, case.change(lambda t: t))), tolerance=1e-13)


# Every score with every order and every way to weigh edges, v1.5's and v2's softmax among them; degrees in turn, so
# that each meets every score, order and way.
NORMS = [name for name, norm in ALL_NORMS.items() if norm.kernels]
WEIGHTS = [
    (norm, distance)
    for (n, norm), (m, distance) in itertools.product(enumerate(NORMS), enumerate(INVERSE_DISTANCES))
    if norm == "molfm" or m != n % 2
]
COMBINATIONS = [
    pytest.param(score, order, *weights, 1 + (s + 2 * order + n) % 4, id=f"{score}-{order}-{'-'.join(weights)}")
    for (s, score), order, (n, weights) in itertools.product(
        enumerate(SCORES), range(len(DIRECTIONS)), enumerate(WEIGHTS)
    )
    if order < 2 or n == s or score == "attention"
]


@interpreted
@pytest.mark.parametrize(("name", "order", "norm", "inverse_distance", "lmax"), COMBINATIONS)
def test_scores_orders_weights_and_degrees(
    operation, name: str, order: int, norm: str, inverse_distance: str, lmax: int
) -> None:
    """Value, gradients and second derivatives against the reference."""
    sizes = {"size": 5, "nodes": 3, "heads": 2, "width": 1, "per_head": 1, "basis": 3, "hidden": 3}
    case = operation(name, norm=norm, order=order, lmax=lmax, inverse_distance=inverse_distance, **sizes)
    assert_equal(*(derivatives(f, case.tensors, case.moving) for f in (case.run, case.reference)))


@interpreted
@pytest.mark.parametrize("name", ON_NODES)
def test_derivatives_against_finite_differences(operation, name: str) -> None:
    """Of all inputs; the edges' operations have their own."""
    small = {"norm": {"channels": 3}, "query_key": {"channels": 2, "width": 3}}
    small |= {key: {"channels": 2} for key in ("feedforward", "feedforward_power")}
    case = operation(name, size=2, **({"lmax": 1} | small[name] if name in small else {}))
    tensors = tuple(case.tensors.values())

    def function(*given: Tensor) -> Tensor:
        return case.run(dict(zip(case.tensors, given, strict=True)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


CHANGES = {
    "one more row": (lambda t: torch.cat([t, t[-1:]]), ValueError),
    "no last column": (lambda t: t[..., :-1], ValueError),
    "one more dimension": (lambda t: t.unsqueeze(0), ValueError),
    "dtype": (lambda t: t.float() if t.is_floating_point() else t.int(), TypeError),
    "device": (lambda t: t.to("meta"), (ValueError, RuntimeError)),
}
# What fits: operations take any number of atoms, elements and paths, cast edges and constants to the features' dtype,
# and cannot know of an atom too few.
ALLOWED = {
    *itertools.product(["x", "h", "coupling", "species"], ["one more row"]),
    *itertools.product(["vec", "coupling"], ["dtype"]),
    ("row_ptr", "no last column"),
    *((f"{prefix}{end}_embedding", "one more row") for prefix in PREFIXES for end in ("target", "source")),
}


@interpreted
@pytest.mark.parametrize("name", ALL)
def test_wrong_arguments_are_named(operation, name: str) -> None:
    """Each argument with a wrong shape, dtype or device raises an error of ours that names it or one it must fit."""
    case = operation(name)
    problems = []
    for argument, (change, (function, error)) in itertools.product(case.tensors, CHANGES.items()):
        wrong = case.tensors | {argument: function(case.tensors[argument].detach())}
        try:
            if (argument, change) not in ALLOWED:
                case.run(wrong)
                problems.append(f"{argument}, {change}: accepted")
        except error as refusal:
            if not (
                str(refusal).split(":")[0] in {*case.tensors, "radial", "dot_weights.radial"}
                or (change == "device" and "Triton needs a CUDA device" in str(refusal))
            ):
                problems.append(f"{argument}, {change}: names no argument: {str(refusal)[:80]}")
        except Exception as other:
            problems.append(f"{argument}, {change}: {type(other).__name__}: {str(other)[:80]}")
    assert not problems, "\n".join(problems)


@interpreted
@pytest.mark.parametrize("name", ["attention", "attention_dot", "edge_degree"])
def test_runs_of_receivers_are_one_graph(operation, name: str) -> None:
    """Atoms worked on a few at a time, down to one with more edges than a chunk takes, give what one chunk gives."""
    results = []
    for chunk in (None, 4, 1):
        torch.manual_seed(0)
        case = operation(name, size=9, chunk=chunk)
        results.append(derivatives(case.run, case.tensors, case.moving))
    for several in results[1:]:
        assert_equal(several, results[0], 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_same_bits_twice(make, operation, name: str, device: str) -> None:
    """Also after the memory that the first run has freed was written over."""
    if device == "cuda":
        make.device, make.dtype = "cuda", torch.float32
    case = operation(name, size=7 if device == "cpu" else 900)
    first = derivatives(case.run, case.change(torch.clone), case.moving)
    sizes = [t.numel() for t in first.values()] * 4
    garbage = [torch.full((size,), 1e30, dtype=make.dtype, device=make.device) for size in sizes]
    del garbage
    second = derivatives(case.run, case.change(torch.clone), case.moving)
    assert all(torch.equal(first[n], second[n]) for n in first)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, relative to the norm of the exact one."""
    return {n: float((found[n].double() - t).norm() / t.norm().clamp(min=1e-6)) for n, t in exact.items()}


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        pytest.param("cpu", "highest", marks=interpreted),
        pytest.param("cuda", "highest", marks=pytest.mark.gpu),
        pytest.param("cuda", "high", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_errors_stay_within_twice_the_references(make, operation, precise, name: str, device: str, precision: str):
    """Float32 or TF32 against float64, of value, gradients and second derivatives together."""
    precise(precision)
    make.device = device
    sizes = WIDE[name] if device == "cuda" else SMALL[name]
    case = operation(name, **sizes)
    exact = derivatives(case.reference, case.tensors, case.moving)
    single = case.change(lambda t: t.float() if t.is_floating_point() else t)
    budget, error = (errors(derivatives(f, single, case.moving), exact) for f in (case.reference, case.run))
    over = {n: (e, budget[n]) for n, e in error.items() if e > 2 * budget[n] + 1e-6}
    assert not over, over


@interpreted
@pytest.mark.parametrize("name", SCORES)
def test_errors_in_half_precision(operation, name: str) -> None:
    """Query, key and value as bfloat16 autocast makes them: within twice the error of the reference in bfloat16."""
    case = operation(name, **SMALL["attention"])
    half = ("query", "key", "value", "dot")
    low = case.change(lambda t: t.float() if t.is_floating_point() else t)
    low = {n: t.detach().bfloat16().requires_grad_() if n in half else t for n, t in low.items()}
    found = []
    for function in (case.reference, case.run):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(low)
        moving = [low[n] for n in case.moving]
        gradients = torch.autograd.grad(out.float().square().sum(), moving)
        found.append(dict(zip(("value", *case.moving), (out, *gradients), strict=True)))
    value = case.reference(case.tensors)
    exact = torch.autograd.grad(value.square().sum(), [case.tensors[n] for n in case.moving])
    exact = dict(zip(("value", *case.moving), (value, *exact), strict=True))
    budget, error = (errors(f, exact) for f in found)
    assert 1e-4 < budget["value"] < 0.1
    over = {n: (e, budget[n]) for n, e in error.items() if e > 2 * budget[n]}
    assert not over, over


@interpreted
@pytest.mark.parametrize("name", [*KERNELS, *SCORES[1:]])
def test_frozen_weights_cost_nothing(operation, spy, name: str) -> None:
    """In forces and their derivatives, which are the reference's, nothing of the weights' gradients is computed."""
    from e2former_kernels.common.sums import ChunkSums
    from e2former_kernels.feedforward import op as passes
    from e2former_kernels.layer_norm import op
    from e2former_kernels.radial.network import RadialNetwork

    sums = [spy(ChunkSums, function) for function in ("add", "add_product")]
    networks, norms = spy(RadialNetwork, "backward"), [spy(m, "launch_norm_reverse") for m in (op, passes)]

    def by_weights() -> bool:
        of_networks = any(weights for (_, _, _, weights, *_), _ in networks)
        return any(sums) or of_networks or any(found is not None for calls in norms for _, (_, found) in calls)

    case = operation(name)
    frozen = {n: t if n in case.moving else t.detach() for n, t in case.tensors.items()}
    found = derivatives(case.run, frozen, case.moving)
    assert not by_weights()
    assert_equal(found, derivatives(case.reference, frozen, case.moving))
    derivatives(case.run, case.tensors, case.moving)
    assert by_weights()
