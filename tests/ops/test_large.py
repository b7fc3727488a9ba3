"""Rows beyond 2^31 numbers: what the last atoms of large tensors get is what the same atoms get by themselves.

On a GPU with 75 GB to spare; in the interpreter the same with a few hundred rows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import build_splines

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs the triton package")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
NEEDED = 75e9  # bytes
NODES = 960_000  # times 9 rows and 256 channels: 2.2e9 numbers
BEYOND = 1 << 31
NAN = float("nan")


class Sizes(NamedTuple):
    """Atoms that receive, and all atoms."""

    receivers: int
    senders: int


@pytest.fixture
def on(make) -> Iterator[Callable[[str], None]]:
    """Make tensors on a device, in float32 on a GPU, where the test is skipped without the memory that it needs."""
    before = torch.get_float32_matmul_precision()

    def use(device: str, precision: str = "highest") -> None:
        torch.set_float32_matmul_precision(precision)
        if device == "cuda":
            make.device, make.dtype = device, torch.float32
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if free < NEEDED:
                pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of free GPU memory, {free / 1e9:.0f} are")

    yield use
    torch.set_float32_matmul_precision(before)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def at_the_end(t: Tensor, rows: int, fill: float) -> Tensor:
    """A tensor of ``rows`` rows that ends with ``t``."""
    whole = t.new_full((rows, *t.shape[1:]), fill)
    whole[rows - t.shape[0] :] = t.detach()
    return whole.requires_grad_(t.requires_grad)


def derivatives(
    run: Callable[[dict], Tensor], tensors: dict, last: dict[str, int], moving: tuple[str, ...], fill: float
) -> dict[str, Tensor]:
    """Value, its gradients, and gradients of the gradients by the moving inputs; of tensors in ``last`` so many rows.

    last: also of the value, under ``value``. Cotangents have ``fill`` in all other rows.
    """
    random = torch.Generator().manual_seed(1)
    inputs = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad}

    def like(name: str, t: Tensor) -> Tensor:
        rows = last.get(name, t.shape[0])
        drawn = torch.randn(rows, *t.shape[1:], generator=random, dtype=torch.float64).to(t)
        return drawn if rows == t.shape[0] else at_the_end(drawn, t.shape[0], fill)

    def ends(kind: str, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = zip(inputs, gradients, strict=True)
        return {f"{kind} {n}": (g[g.shape[0] - last[n] :] if n in last else g).clone() for n, g in named}

    out = run(tensors)
    found = {"value": out.detach()[out.shape[0] - last["value"] :].clone()}
    cotangent = like("value", out)
    found |= ends("gradient by", torch.autograd.grad(out, list(inputs.values()), cotangent, retain_graph=True))
    forces = torch.autograd.grad(out, [inputs[n] for n in moving], cotangent, create_graph=True)
    del out
    directions = [like(n, g) for n, g in zip(moving, forces, strict=True)]
    second = torch.autograd.grad(forces, list(inputs.values()), directions, materialize_grads=True)
    return found | ends("second derivative by", second)


def assert_same(large: dict[str, Tensor], small: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in small.items():
        assert large[name].shape == expected.shape and large[name].isfinite().all(), name
        assert (large[name] - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["norm", "so3_linear", "feedforward", "query_key"])
def test_operations_on_nodes(make, operation, on, name: str, device: str) -> None:
    """Zero features in all rows but the last hundred: gradients by the weights are theirs alone too."""
    on(device)
    rows, sizes = (NODES, {"size": 100, "channels": 256}) if device == "cuda" else (13, {"size": 4})
    case = operation(name, **sizes)
    last = dict.fromkeys((*case.moving, "value"), sizes["size"])
    moving = case.moving[:1]
    small = derivatives(case.run, case.tensors, last, moving, 0.0)
    large = {n: at_the_end(t, rows, 0.0) if n in case.moving else t for n, t in case.tensors.items()}
    assert device == "cpu" or large[moving[0]].numel() > BEYOND
    assert_same(derivatives(case.run, large, last, moving, 0.0), small, 1e-4 if device == "cuda" else 1e-11)


def frozen(tensors: dict, last_layer: bool) -> dict:
    """The radial network's weights without gradients, and its splines."""
    fixed = {n: t.detach() if n.startswith("radial") else t for n, t in tensors.items()}
    weights = RadialWeights(*(fixed.get(f"radial.{n}") for n in RadialWeights._fields))
    return fixed | {"splines": build_splines(weights, 3.0, range(4), last_layer, tolerance=1e-3)}


def two_sizes(tensors: dict, heard: int, told: int, sizes: Sizes) -> tuple[dict, dict]:
    """A graph whose last ``heard`` receivers hear the last ``told`` atoms, alone and at the end of larger tensors.

    tensors: of ``heard + told`` atoms. The rows before those used hold NaN.
    """
    edges, device = tensors["source"].numel(), tensors["source"].device
    target = torch.randint(0, heard, (edges,)).sort().values.to(device)
    source = torch.randint(0, told, (edges,)).to(device)
    row_ptr = torch.searchsorted(target, torch.arange(heard + 1, device=device))
    found = []
    for receivers, senders in (Sizes(heard, heard + told), sizes):
        species = torch.zeros(senders, dtype=torch.long, device=device)
        species[receivers - heard : receivers] = tensors["species"][:heard]
        species[senders - told :] = tensors["species"][heard:]
        graph = {
            "target": target + receivers - heard,
            "source": source + senders - told,
            "row_ptr": torch.cat([row_ptr.new_zeros(receivers - heard), row_ptr]),
            "species": species,
        }
        for n, used, rows in (
            ("query", heard, receivers),
            ("dot", heard, receivers),
            ("key", told, senders),
            ("value", told, senders),
        ):
            if n in tensors:
                graph[n] = at_the_end(tensors[n][:used].detach().requires_grad_(), rows, NAN)
        found.append(tensors | graph)
    return found[0], found[1]


# The receivers' outer products are [N, 27, 256], their result is [N, 20, 256]; what senders have is [N', 9, 256].
ENDS = {"receivers": Sizes(425_000, 425_100), "senders": Sizes(1000, NODES)}
HEARD, TOLD = 30, 50
KINDS = {
    "trained": ("attention", "highest"),
    "frozen": ("attention", "high"),  # splines and float16 rows
    "dot": ("attention_dot", "highest"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("end", "kind"), [(e, k) for e in ENDS for k in KINDS if (e, k) != ("receivers", "dot")])
def test_attention(make, operation, on, spy, end: str, kind: str, device: str) -> None:
    from e2former_kernels.equivariant_attention import fused

    name, precision = KINDS[kind]
    on(device, precision)
    gpu = device == "cuda"
    wide = {"size": 300, "nodes": HEARD + TOLD, "heads": 128, "per_head": 2, "basis": 16, "hidden": 16, "lmax": 2}
    case = operation(name, **(wide if gpu else {"size": 9, "nodes": 7}))
    heard, told, sizes = (HEARD, TOLD, ENDS[end]) if gpu else (3, 4, Sizes(11, 20))
    tensors = dict(case.tensors)
    if gpu:
        tensors["coupling"] = make(20, 3, 9).detach()  # as many paths as the network has
    if kind == "frozen":
        tensors = frozen(tensors, last_layer=True)
    found, asked = [], spy(fused, "half_rows")
    for given in two_sizes(tensors, heard, told, sizes):
        given["features"] = given.pop("value")  # "value" is the result, whose rows are the receivers'
        last = {"query": heard, "dot": heard, "key": told, "features": told, "value": heard}
        more = {"half": gpu} if kind == "frozen" else {}
        run = lambda t: case.run(t | {"value": t["features"]} | more)  # noqa: B023, E731
        found.append(derivatives(run, given, last, ("vec",), NAN))
    assert not gpu or max(sizes.receivers * 20 * 256, given["features"].numel()) > BEYOND
    assert bool(asked) is (gpu and kind == "frozen"), "float16 rows"
    assert_same(*found[::-1], 1e-5 if gpu else 1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["trained", "frozen"])
def test_edge_degree(make, operation, on, weights: str, device: str) -> None:
    """The sums are [N, 9, 260]: beyond 2^31 numbers too."""
    on(device)
    wide = {"size": 300, "nodes": HEARD + TOLD, "width": 64, "basis": 16, "hidden": 256}
    case = operation("edge_degree", **(wide if device == "cuda" else {"size": 9, "nodes": 7}))
    heard, told, rows = (HEARD, TOLD, NODES) if device == "cuda" else (3, 4, 20)
    tensors = case.tensors if weights == "trained" else frozen(case.tensors, last_layer=False)
    graphs = two_sizes(tensors, heard, told, Sizes(rows - told, rows))
    small, large = (derivatives(case.run, t, {"value": heard}, ("vec",), 0.0) for t in graphs)
    assert_same(large, small, 1e-4 if device == "cuda" else 1e-11)
