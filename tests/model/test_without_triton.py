"""Triton is a dependency on Linux only: elsewhere the package imports and the reference runs."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys

sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
import importlib.util

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)

import torch

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import build_graph
from e2former_fairchem.model import E2FormerV2

assert not any(name.startswith("triton.") for name in sys.modules)
shape = dict(lmax=1, sphere_channels=8, num_layers=1, num_heads=4, head_dim=2, num_radial_basis=8)
pos = (3 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
zeros, numbers = torch.zeros(4, dtype=torch.long), torch.tensor([1, 6, 8, 1])
open_cell = torch.eye(3)[None], torch.zeros(1, 3, dtype=torch.bool)


def evaluate(**config):
    graph = build_graph(pos, *open_cell, zeros, torch.tensor([4]), 6.0)
    model = E2FormerV2(E2FormerV2Config(**shape, **config))
    return model, model(numbers, zeros[:1], zeros[:1], zeros, pos, graph)


for score in ("qk", "qk_dot", "qk_dot_scalar"):
    model, x = evaluate(score=score)
    (slope,) = torch.autograd.grad(x.square().sum(), pos, create_graph=True)
    slope.square().sum().backward()
    assert slope.abs().max() > 0 and model.blocks[0].attention.out.weight.grad.isfinite().all()
try:
    evaluate(kernel_backend="triton")
except RuntimeError as error:
    assert "triton package is not installed" in str(error), error
else:
    raise AssertionError("kernel_backend=triton ran without the triton package")
"""


def test_reference_runs_and_kernels_are_refused() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
