"""The whole network on the Triton kernels equals the whole network on the reference.

On a GPU (``pytest -m gpu``): every file of reference arrays, every system. Without one, in Triton's interpreter: the
smallest system of a few files, and a toy network's second derivatives and training.
"""

from __future__ import annotations

import sys
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
from test_molfm_parity import FILES, FOLDER, build

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOY = {"lmax": 1, "sphere_channels": 8, "num_layers": 1, "num_heads": 4, "head_dim": 2, "num_radial_basis": 8}
PAPER = {"sphere_channels": 256, "num_layers": 2, "num_heads": 128, "num_radial_basis": 256}
# Two scores and both releases' softmax norms; the interpreter takes half a minute for each.
INTERPRETED = ("head_QK_alpha_lmax1", "v2tag_QKdot_alpha")


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


@pytest.mark.skipif(not FILES, reason=f"no reference arrays in {FOLDER}; name their folder in E2FORMER_FIXTURES")
@pytest.mark.parametrize("stem", INTERPRETED)
def test_smallest_system_of_a_file(stem: str, float64_default: None) -> None:
    fixture = load_fixture(FOLDER / f"{stem}.npz")
    name = min(fixture.systems, key=lambda n: len(fixture.systems[n]["edges/i"]) or 10**9)
    compare(fixture, with_triton(fixture), name, torch.float64, "cpu", 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file(path: Path) -> None:
    fixture = load_fixture(path)
    model = with_triton(fixture).cuda()
    for name in fixture.systems:
        compare(fixture, model, name, torch.float32, "cuda", 5e-5)


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
def test_stress_hessian_and_training(device: str, float64_default: None) -> None:
    """Second derivatives and training gradients; then the losses of a few steps of Adam, which feel every gradient."""
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
    # At 3e-3 the wide network's losses change by 2.6 % within 20 steps when its float32 weights change by 1e-7 of
    # themselves (reference, CPU); at 3e-4 by 1.5e-4: a rate at which a wrong gradient can be told from rounding.
    steps, rate = (3, 3e-3) if interpreted else (20, 1e-4)
    losses = [losses_of_training(model, crystal(dtype, device), steps, rate) for model in models]
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
    """bfloat16 autocast, as fairchem's trainer sets it: one more dtype, the same function to its precision."""
    found = []
    for backend in ("reference", "triton"):
        model = network(backend, device, **TOY, cutoff=3.2, **config).train()
        data = crystal(torch.float32, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            out = model(data)
        sum(out[key][key].float().square().sum() for key in ("energy", "forces", "stress")).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((out["energy"]["energy"].detach(), out["forces"]["forces"].detach(), gradients))
    for expected, got in zip(*found, strict=True):
        assert got.isfinite().all() and (got - expected).norm() < 0.1 * expected.norm()
