"""With TF32 allowed and weights frozen, the kernels gather float16 rows: as close to float64 as TF32 is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_kernels.common.backend import triton_installed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
ATOMS = 5
ROUNDING = 2.0**-11


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def features_and_forces(config: dict, dtype: torch.dtype, trained: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    shape = {"lmax": 1, "sphere_channels": 12, "num_layers": 1, "num_heads": 6, "head_dim": 4, "num_radial_basis": 8}
    model = E2FormerV2(E2FormerV2Config(**shape, max_num_elements=10, **config))
    model = model.to(dtype)
    if not trained:
        model.freeze()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(1)
    pos = (4 * torch.rand(ATOMS, 3, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    zeros, numbers = torch.zeros(ATOMS, dtype=torch.long), torch.tensor([1, 6, 8, 1, 1])
    cell, pbc = torch.eye(3, dtype=dtype).unsqueeze(0), torch.zeros(1, 3, dtype=torch.bool)
    for _ in range(2):  # the second evaluation makes splines of frozen radial networks
        graph = build_graph(pos, cell, pbc, zeros, torch.tensor([ATOMS]), 6.0)
        x = model(numbers, zeros[:1], zeros[:1], zeros, pos, graph)
        (slope,) = torch.autograd.grad(x[:, 0].sum() + x.square().sum(), pos)
    return x.detach().double(), slope.double()


@pytest.mark.parametrize("norm", ["smooth", "softplus"])
def test_errors_are_roundings(norm: str, precision: None) -> None:
    config = {"attention_norm": norm}
    expected = features_and_forces(config | {"kernel_backend": "reference"}, torch.float64)
    errors = {}
    for name, trained in (("highest", False), ("high", False), ("high", True)):
        torch.set_float32_matmul_precision(name)
        found = features_and_forces(config | {"kernel_backend": "triton"}, torch.float32, trained)
        errors[name, trained] = [
            float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)
        ]  # fmt: skip
    assert max(errors["highest", False]) < 2e-5
    assert max(errors["high", True]) < 2e-5, "trained weights keep float32, which the CPU does not round to TF32"
    assert min(errors["high", False]) > 0.1 * ROUNDING
    assert max(errors["high", False]) < 6 * ROUNDING
