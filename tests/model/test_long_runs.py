"""The memory of a GPU stays what it was, over hundreds of evaluations of moving atoms and steps of training."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms

from e2former_fairchem.hydra_model import E2FormerV2HydraModel
from e2former_fairchem.testing import atomic_data

SHAPE = {"lmax": 1, "sphere_channels": 8, "num_layers": 2, "num_heads": 4, "head_dim": 2, "num_radial_basis": 8}
FRAMES = 10
#: Bytes. A graph of these atoms alone takes 60 kB: one that stays every tenth step is seen.
MOST = 100_000


def cluster(periodic: bool) -> Atoms:
    """216 atoms on a rough lattice, about 18 neighbours each."""
    random = np.random.default_rng(0)
    sites = 2.2 * np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3)
    found = Atoms(random.choice([1, 6, 8], len(sites)), sites + random.normal(0, 0.1, sites.shape))
    if periodic:
        found.set_cell([13.2, 13.2, 13.2])
        found.pbc = True
    return found


def network(device: str, stress: bool = False, **config: object) -> E2FormerV2HydraModel:
    torch.manual_seed(0)
    return E2FormerV2HydraModel(
        backbone={
            "model": "e2former_fairchem.backbone.E2FormerV2Backbone",
            "cutoff": 4.0,
            "max_num_elements": 10,
            "kernel_backend": "triton",
            "regress_stress": stress,
            **SHAPE,
            **config,
        },
        heads={"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead"}},
        pass_through_head_outputs=True,
    ).to(device)


def growth(step: Callable[[int], None], steps: int) -> int:
    """Bytes that are held after so many steps and were not held after the first frames of a motion that repeats."""
    held = []
    for n in range(steps):
        step(n % FRAMES)
        if n in (4 * FRAMES - 1, steps - 1):  # the same frame, so that what it keeps has the same size
            gc.collect()
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    assert (steps - 4 * FRAMES) % FRAMES == 0
    return held[1] - held[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("execution", "periodic", "config"),
    [
        ("replayed", False, {}),
        ("replayed", True, {}),
        ("frozen", True, {"cuda_graph": False}),
        ("frozen", False, {"convolution": "eaas"}),
        ("kernels", True, {}),
        ("reference", False, {"kernel_backend": "reference"}),
    ],
)
def test_five_hundred_evaluations(execution: str, periodic: bool, config: dict) -> None:
    """Energy, forces and, of crystals, stress; neighbours come and go."""
    model = network("cuda", periodic, **config).eval()
    if execution in ("replayed", "frozen"):
        model.backbone.model.freeze()
    data = atomic_data([cluster(periodic)], torch.float32).to("cuda")
    random = torch.Generator().manual_seed(0)
    moves = 0.1 * torch.randn(FRAMES, len(data["pos"]), 3, generator=random).cuda()
    edges = set()

    def step(frame: int) -> None:
        given = data.clone()
        given["pos"] = data["pos"] + moves[frame]
        out = model(given)
        edges.add(round(float(out["forces"]["forces"].square().sum()), 2))

    assert growth(step, 500) < MOST
    assert model.backbone.model.execution == execution and len(edges) >= FRAMES


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "config"), [("highest", {}), ("high", {"score": "qk_dot"}), ("high", {"convolution": "eaas"})]
)
def test_two_hundred_steps_of_training(precision: str, config: dict, matmul_precision: Callable[[str], None]) -> None:
    """On energies and forces, with second derivatives, of batches that change."""
    matmul_precision(precision)
    model = network("cuda", **config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    data = atomic_data([cluster(False), cluster(True)[:30]], torch.float32).to("cuda")
    random = torch.Generator().manual_seed(0)
    moves = 0.1 * torch.randn(FRAMES, len(data["pos"]), 3, generator=random).cuda()

    def step(frame: int) -> None:
        given = data.clone()
        given["pos"] = data["pos"] + moves[frame]
        out = model(given)
        loss = out["energy"]["energy"].square().mean() + out["forces"]["forces"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert growth(step, 200) < MOST
    assert model.backbone.model.execution == "kernels"


@pytest.mark.gpu
def test_the_measure_sees_what_stays() -> None:
    """A leak as there was one: a graph's tensors, each step."""
    kept = []

    def step(frame: int) -> None:
        kept.append(torch.zeros(3 * 216 * 18, device="cuda"))

    assert growth(step, 100) > MOST
