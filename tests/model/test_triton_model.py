"""The whole network on the Triton kernels equals the whole network on the reference.

On a GPU (``pytest -m gpu``): every file of reference arrays, every system. Without one, in Triton's interpreter: every
file's network on three atoms, one file's smallest system, and a toy network's stress, Hessian and training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.models.base import HydraModel

from e2former_fairchem.testing import atomic_data as batch_of

sys.path.insert(0, str(Path(__file__).parent))
from molfm_fixtures import Fixture, atomic_data, load_fixture
from test_molfm_parity import FOLDER, PATHS, build, needs_files

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOY = {"lmax": 1, "sphere_channels": 8, "num_layers": 1, "num_heads": 4, "head_dim": 2, "num_radial_basis": 8}
PAPER = {"sphere_channels": 256, "num_layers": 2, "num_heads": 128, "num_radial_basis": 256}
# The smallest network: a larger one takes the interpreter half a minute.
INTERPRETED = ("head_QK_alpha_lmax1",)
# Differ from the file named by what three atoms and a conserving model have no use for: a direct head; neighbours
# beyond the fifth or 3.5 Å.
TWINS = {"head_QKdot_alpha_painn": "head_QKdot_alpha", "v2tag_QK_alpha_topk5_r3p5": "v2tag_QK_alpha"}


def with_triton(fixture: Fixture, conserving: bool = True) -> HydraModel:
    model = build(fixture, conserving)
    object.__setattr__(model.backbone.model.config, "kernel_backend", "triton")
    return model


def compare(fixture: Fixture, model: HydraModel, name: str, dtype: torch.dtype, device: str, tolerance: float) -> None:
    system = fixture.systems[name]
    result = model(atomic_data(system, dtype).to(device))
    for key, value in (("energy", result["energy"]["energy"]), ("forces", result["forces"]["forces"])):
        expected = system[f"{fixture.outputs}/{key}"]
        error = np.abs(value.detach().double().cpu().numpy() - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{fixture.name}/{name} {key}: relative error {error:.1e}, allowed {tolerance:.0e}"


@needs_files
@pytest.mark.parametrize("stem", INTERPRETED)
def test_smallest_system_of_a_file(stem: str, float64_default: None) -> None:
    fixture = load_fixture(FOLDER / f"{stem}.npz")
    name = min(fixture.systems, key=lambda n: len(fixture.systems[n]["edges/i"]) or 10**9)
    compare(fixture, with_triton(fixture), name, torch.float64, "cpu", 1e-10)


@pytest.mark.gpu
@needs_files
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_file(path: Path) -> None:
    fixture = load_fixture(path)
    model = with_triton(fixture).cuda()
    for name in fixture.systems:
        compare(fixture, model, name, torch.float32, "cuda", 5e-5)


@needs_files
@pytest.mark.parametrize("path", [p for p in PATHS if p.stem not in TWINS], ids=lambda p: p.stem)
def test_every_network_on_three_atoms(path: Path, float64_default: None) -> None:
    """Each file's weights: energy, forces, and the gradients of a loss of both, by the Hessian and by every weight.

    Three atoms: with one neighbour each a softmax does not feel its scores.
    """
    fixture = load_fixture(path)
    found = []
    for model in (build(fixture, True), with_triton(fixture)):
        data = batch_of([Atoms("HCO", [[0.0, 0.1, 0.0], [0.8, 0.7, 0.4], [1.9, 0.6, 0.9]])], torch.float64)
        out = model.train()(data)
        energy, forces = out["energy"]["energy"], out["forces"]["forces"]
        inputs = [data["pos"], *(p for p in model.parameters() if p.requires_grad)]
        loss = energy.square().sum() + forces.square().sum()
        by_position, *gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        found.append([energy, forces, by_position, torch.cat([g.flatten() for g in gradients])])
    for expected, got in zip(*found, strict=True):
        assert expected.abs().max() > 0
        assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


def network(backend: str, device: str, **config: object) -> HydraModel:
    """The same random weights for either backend."""
    torch.manual_seed(0)
    return HydraModel(
        backbone={
            "model": "e2former_fairchem.backbone.E2FormerV2Backbone",
            "kernel_backend": backend,
            "regress_stress": True,
            **config,
        },
        heads={"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead"}},
        pass_through_head_outputs=True,
    ).to(device)


def crystal(dtype: torch.dtype, device: str) -> AtomicData:
    """Two atoms of a skewed cell, a few edges each."""
    cell = [[2.9, 0.1, 0], [0.3, 3.1, 0], [0, -0.2, 3.3]]
    atoms = Atoms("CO", [[0.0, 0.0, 0.0], [0.9, 0.6, 0.4]], cell=cell, pbc=True)
    return batch_of([atoms], dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_stress_and_hessian(device: str, float64_default: None) -> None:
    """Of a crystal, row by row of the Hessian."""
    interpreted = device == "cpu"
    dtype = torch.float64 if interpreted else torch.float32
    torch.set_default_dtype(dtype)
    tolerance = 1e-10 if interpreted else 5e-5
    config = TOY | {"cutoff": 3.2} if interpreted else PAPER
    models = [network(backend, device, **config) for backend in ("reference", "triton")]
    data = [crystal(dtype, device) for _ in models]
    for model in models:
        model.eval()
        model.backbone.regress_config.hessian = True
    expected, got = (model(d) for model, d in zip(models, data, strict=True))
    for key in ("energy", "forces", "stress", "hessian"):
        scale = expected[key][key].abs().max()
        assert (got[key][key] - expected[key][key]).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("device", DEVICES)
def test_losses_of_training(device: str, float64_default: None) -> None:
    """Steps of Adam feel every gradient. In the interpreter only the bonded pair sees each other."""
    interpreted = device == "cpu"
    dtype = torch.float64 if interpreted else torch.float32
    torch.set_default_dtype(dtype)
    config = TOY | {"cutoff": 1.5} if interpreted else PAPER
    # At 3e-3 the wide network's losses change by 2.6 % within 20 steps when its float32 weights change by 1e-7 of
    # themselves (reference, CPU); at 3e-4 by 1.5e-4: a rate at which a wrong gradient can be told from rounding.
    steps, rate = (6, 1e-2) if interpreted else (20, 1e-4)
    losses = [
        losses_of_training(network(backend, device, **config), crystal(dtype, device), steps, rate)
        for backend in ("reference", "triton")
    ]
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8 if interpreted else 1e-3)


def losses_of_training(model: HydraModel, data: AtomicData, steps: int, rate: float) -> list[float]:
    """Losses before each step of Adam towards zero energy, forces and stress."""
    model.train()
    model.backbone.regress_config.hessian = False
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        out = model(data.clone())
        loss = sum(out[key][key].square().sum() for key in ("energy", "forces", "stress"))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [{}, {"score": "qk_dot_scalar"}, {"convolution": "eaas"}, {"message_order": 0}])
def test_training_under_autocast(device: str, config: dict) -> None:
    """bfloat16 autocast, as fairchem's trainer sets it: as near to float32 as the reference is under it, twice."""
    found = []
    for backend, low in (("reference", False), ("reference", True), ("triton", True)):
        model = network(backend, device, **TOY, cutoff=3.2, **config).train()
        data = crystal(torch.float32, device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            out = model(data)
        sum(out[key][key].float().square().sum() for key in ("energy", "forces", "stress")).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((out["energy"]["energy"].detach(), out["forces"]["forces"].detach(), gradients))
    # energy and forces, numbers of one network each, together: one alone may round well by chance
    budget, error = (
        [float((got - exact).norm() / exact.norm()) for exact, got in zip(found[0], low, strict=True)]
        for low in found[1:]
    )
    assert all(got.isfinite().all() for got in found[2])
    assert max(error[:2]) <= 2 * max(budget[:2]) and error[2] <= 2 * budget[2], (error, budget)


def forces_and_gradients(model: HydraModel, data: AtomicData) -> list[torch.Tensor]:
    """Energy, forces, stress and the gradient of a loss of them by all weights."""
    model.train()
    out = model(data)
    found = [out[key][key] for key in ("energy", "forces", "stress")]
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = sum(x.square().sum() for x in found)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in found), torch.cat([g.flatten() for g in gradients])]


@pytest.mark.parametrize("score", ["qk", "qk_dot"])
def test_activation_checkpointing(score: str, float64_default: None, spy: Callable) -> None:
    """Blocks are evaluated again in the backward pass, and nothing changes by it."""
    from e2former_fairchem.nn.block import TransformerBlock

    calls, found = spy(TransformerBlock, "forward"), []
    for flag in (False, True):
        calls.clear()
        model = network("triton", "cpu", **TOY, cutoff=2.5, score=score, activation_checkpointing=flag)
        found.append(forces_and_gradients(model, crystal(torch.float64, "cpu")))
        assert (len(calls) > 1) is flag
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_compiled_around_the_kernels(device: str, float64_default: None) -> None:
    """torch.compile leaves the kernels to themselves and gives the same numbers."""
    dtype, tolerance = (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 1e-5)
    torch.set_default_dtype(dtype)
    found = []
    try:
        for compiled in (False, True):
            model = network("triton", device, **TOY, cutoff=2.5).eval().requires_grad_(False)
            data = crystal(dtype, device)
            out = (torch.compile(model, dynamic=True, backend="aot_eager") if compiled else model)(data)
            found.append([out[key][key] for key in ("energy", "forces", "stress")])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    finally:
        torch._dynamo.reset()
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
