"""The EAAS layer: kernel, axis-aligned frame and dense contraction are one function."""

from __future__ import annotations

import pytest
import torch

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.eaas import (
    EAASTables,
    axis_aligned_contraction,
    axis_aligned_contraction_reference,
    dense_contraction_reference,
)

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)


def tables(lmax: int) -> EAASTables:
    from e2former_fairchem.nn.axis_aligned import eaas_tables
    from e2former_fairchem.so3 import path_table

    return eaas_tables(path_table(lmax))


@pytest.fixture
def positions() -> torch.Tensor:
    """On the polar axis, near it, at the origin, anywhere."""
    special = [[0, 2, 0], [0, -2, 0], [1e-9, -1, 0], [0, 0, 0], [0.3, 0.1, -0.7]]
    return torch.tensor(special, dtype=torch.float64, requires_grad=True)


@interpreted
@pytest.mark.parametrize("lmax", [1, 2, 3, 4])
def test_kernel_frame_and_dense_agree(make, compare, positions, lmax: int) -> None:
    constants = tables(lmax)
    value = make(5, (lmax + 1) ** 2, 3)
    for function in (axis_aligned_contraction, axis_aligned_contraction_reference):
        dense = dense_contraction_reference(value, positions, constants)
        compare(function(value, positions, constants), dense, [value, positions])


@interpreted
def test_gradgradcheck_at_singular_directions(make, positions) -> None:
    constants = tables(2)
    value = make(5, 9, 2)
    function = lambda v, r: axis_aligned_contraction(v, r, constants)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (value, positions), fast_mode=True)


@interpreted
def test_wrong_arguments_are_named(make, positions) -> None:
    with pytest.raises(ValueError, match="value"):
        axis_aligned_contraction(make(5, 8, 3), positions, tables(2))
    with pytest.raises(ValueError, match="position"):
        axis_aligned_contraction(make(4, 9, 3), positions, tables(2))
