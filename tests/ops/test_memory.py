"""Peak memory against the number of neighbours, at fixed atoms: nothing of size edges x heads or edges x channels."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from e2former_kernels.common.backend import triton_installed

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs the triton package")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")
PASSES = ("value", "gradients", "forces", "second derivatives")


def peak(function: Callable[[], object], device: str) -> tuple[object, int]:
    """Result and the largest memory in use beyond that at the start, in bytes: what the allocator itself reports."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return result, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.device_type() == DeviceType.CPU]
    return result, max(itertools.accumulate(sizes), default=0)


def regular(case, nodes: int, neighbours: int) -> dict[str, Tensor]:
    """Every atom hears ``neighbours`` others, the next atom the ones after those: chunks have equally many senders."""
    like = case.tensors["source"]
    target = torch.arange(nodes, device=like.device).repeat_interleave(neighbours)
    step = torch.arange(1, neighbours + 1, device=like.device).repeat(nodes)
    ptr = torch.arange(nodes + 1, device=like.device) * neighbours
    return case.tensors | {"source": (target * neighbours + step) % nodes, "target": target, "row_ptr": ptr}


def peaks(case, nodes: int, neighbours: int) -> dict[str, int]:
    """Peak of each pass: value, gradients of everything, gradients with a graph, and their derivatives."""
    tensors = regular(case, nodes, neighbours)
    device = tensors["vec"].device.type
    inputs = [t for t in tensors.values() if t.requires_grad]
    moving = [tensors[n] for n in case.moving]
    found = {}
    out, found["value"] = peak(lambda: case.run(tensors), device)
    _, found["gradients"] = peak(lambda: torch.autograd.grad(out.sum(), inputs, retain_graph=True), device)
    cotangent = torch.ones_like(out)
    forces, found["forces"] = peak(lambda: torch.autograd.grad(out, moving, cotangent, create_graph=True), device)
    loss = sum(f.sum() for f in forces)
    _, found["second derivatives"] = peak(lambda: torch.autograd.grad(loss, inputs, allow_unused=True), device)
    return found


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter leaves the arguments of a launch in reference cycles: collect them after each."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def run(self, *args, **kwargs) -> None:
        launch(self, *args, **kwargs)
        gc.collect()

    monkeypatch.setattr(GridExecutor, "__call__", run)
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def growth(operation, name: str, nodes: int, few: int, many: int, **sizes) -> dict[str, float]:
    """Bytes of each pass for one more edge. A first call makes what is made once."""
    peaks(operation(name, nodes=2, size=2, **sizes), 2, 1)
    found = [peaks(operation(name, nodes=nodes, size=nodes * k, **sizes), nodes, k) for k in (few, many)]
    return {n: (found[1][n] - found[0][n]) / (nodes * (many - few)) for n in PASSES}


INTERPRETED = {
    "attention": {"heads": 128, "per_head": 1, "width": 1, "hidden": 32, "lmax": 1, "order": 0},
    "attention_dot": {"heads": 128, "per_head": 1, "width": 1, "hidden": 32, "lmax": 1, "order": 0},
    "edge_degree": {"width": 8, "hidden": 128, "lmax": 1, "basis": 2},
}
PAPER = {
    "attention": {"heads": 128, "per_head": 2, "width": 8, "hidden": 128, "basis": 256, "lmax": 2},
    "edge_degree": {"width": 256, "hidden": 128, "basis": 256, "lmax": 2},
}
HEADS = 128  # numbers of an edge; its vectors and indices are a tenth of that


@interpreted
@pytest.mark.parametrize("name", INTERPRETED)
def test_growth_with_neighbours(operation, collected, name: str) -> None:
    """In chunks of six edges, from three chunks to six, no pass grows by a number for each head and edge."""
    found = growth(operation, name, nodes=6, few=3, many=6, chunk=6, **INTERPRETED[name])
    assert all(bytes_per_edge < 0.4 * 8 * HEADS for bytes_per_edge in found.values()), found


@interpreted
@pytest.mark.parametrize("name", ["attention", "edge_degree"])
def test_the_recorder_sees_edge_tensors(operation, collected, name: str) -> None:
    """The check can fail: with all edges in one chunk every pass grows by several numbers for each head and edge."""
    found = growth(operation, name, nodes=6, few=2, many=4, chunk=None, **INTERPRETED[name])
    assert all(bytes_per_edge > 8 * HEADS for bytes_per_edge in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAPER)
def test_growth_at_full_width(make, operation, name: str) -> None:
    """The paper's network, 20,000 atoms, 32 and 96 neighbours, in chunks as the operation itself chooses them."""
    make.device, make.dtype = "cuda", torch.float32
    found = growth(operation, name, nodes=20_000, few=32, many=96, **PAPER[name])
    assert all(bytes_per_edge < 0.4 * 4 * HEADS for bytes_per_edge in found.values()), found
