"""The EAAS layer: kernels, axis-aligned frame and dense contraction are one function."""

from __future__ import annotations

import pytest
import torch

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.eaas import (
    EAASConstants,
    axis_aligned_contraction,
    axis_aligned_contraction_reference,
    dense_contraction_reference,
)

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)


def constants_of(lmax: int, reflection_equivariant: bool = False) -> EAASConstants:
    from e2former_fairchem.nn.axis_aligned import eaas_constants
    from e2former_fairchem.so3 import make_paths

    return eaas_constants(make_paths(lmax, reflection_equivariant))


def constants_on(device: str, lmax: int, dtype: torch.dtype = torch.float64) -> EAASConstants:
    given = constants_of(lmax)
    recursion = tuple(t.to(device, dtype) for t in given.recursion)
    moved = {"coupling": given.coupling.to(device, dtype), "aligned_value": given.aligned_value.to(device, dtype)}
    return given._replace(aligned_index=given.aligned_index.to(device), recursion=recursion, **moved)


@pytest.fixture
def positions() -> torch.Tensor:
    """On the polar axis and on the frame's two others, near them, at the origin and next to it, anywhere."""
    special = [
        [0, 2, 0], [0, -2, 0], [1e-9, -1, 0], [0, 0, 0], [0.3, 0.1, -0.7], [-2, 0, 0], [0, 0, -3], [1e-170, 1, -1e-170],
        [1e-12, 0, 1e-12], [0, -0.0, 1e-9],
    ]  # fmt: skip
    return torch.tensor(special, dtype=torch.float64, requires_grad=True)


@interpreted
@pytest.mark.parametrize("reflection_equivariant", [False, True])
@pytest.mark.parametrize("lmax", [1, 2, 3, 4])
def test_frame_and_dense_agree(make, compare, positions, lmax: int, reflection_equivariant: bool) -> None:
    constants = constants_of(lmax, reflection_equivariant)
    value = make(len(positions), (lmax + 1) ** 2, 3)
    dense = dense_contraction_reference(value, positions, constants)
    compare(axis_aligned_contraction_reference(value, positions, constants), dense, [value, positions])


@interpreted
@pytest.mark.parametrize("reflection_equivariant", [False, True])
@pytest.mark.parametrize("lmax", [1, 2, 3, 4])
def test_kernels_and_dense_agree(make, compare, positions, lmax: int, reflection_equivariant: bool) -> None:
    """Value, gradients (the transpose, the slope in the position) and second derivatives."""
    constants = constants_of(lmax, reflection_equivariant)
    value = make(len(positions), (lmax + 1) ** 2, 3)
    dense = dense_contraction_reference(value, positions, constants)
    compare(axis_aligned_contraction(value, positions, constants), dense, [value, positions])


@interpreted
def test_gradgradcheck_at_singular_directions(make, positions) -> None:
    constants = constants_of(2)
    value = make(len(positions), 9, 2)
    function = lambda v, r: axis_aligned_contraction(v, r, constants)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (value, positions), fast_mode=True)


@interpreted
@pytest.mark.parametrize("nodes, channels", [(0, 5), (1, 1), (9, 24), (17, 37), (3, 300)])
def test_sizes_and_strides(make, compare, nodes: int, channels: int) -> None:
    """No atoms, channels that are no power of two or take several programs, inputs that are views."""
    constants = constants_of(2)
    base, pos = make(9, nodes, channels), make(3, nodes)
    value, position = base.transpose(0, 1), pos.T
    dense = dense_contraction_reference(value, position, constants)
    compare(axis_aligned_contraction(value, position, constants), dense, [base, pos])


@interpreted
@pytest.mark.parametrize("lmax, nodes, channels", [(1, 10, 5), (2, 10, 300), (3, 9, 1), (4, 10, 3), (2, 0, 4)])
def test_fused_gradients(make, positions, lmax: int, nodes: int, channels: int) -> None:
    """Where nothing differentiates through the gradients, one pass makes both."""
    constants = constants_of(lmax)
    value, position = make(nodes, (lmax + 1) ** 2, channels), positions[:nodes]
    outputs = [f(value, position, constants) for f in (axis_aligned_contraction, dense_contraction_reference)]
    cotangent = torch.randn_like(outputs[0])
    found, expected = (torch.autograd.grad(out, [value, positions], cotangent) for out in outputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def derivatives(function, value: torch.Tensor, position: torch.Tensor, constants: EAASConstants) -> dict:
    """Value, gradients by value and position, and gradients of a function of the latter; the same random numbers."""
    random = torch.Generator().manual_seed(1)

    def like(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)

    inputs = [value.detach().requires_grad_(), position.detach().requires_grad_()]
    out = function(*inputs, constants)
    first = torch.autograd.grad(out, inputs, like(out), create_graph=True)
    second = torch.autograd.grad(sum((g * like(g)).sum() for g in first), inputs)
    names = ("value", "gradient by value", "gradient by position", "second by value", "second by position")
    return dict(zip(names, (t.detach() for t in (out, *first, *second)), strict=True))


@pytest.mark.parametrize("lmax", [1, 2, 3])
def test_errors_in_float32(device: str, positions: torch.Tensor, lmax: int) -> None:
    """The same bits twice, and at most twice what the reference loses, singular directions and the origin included."""
    channels, anywhere = (5, 3) if device == "cpu" else (256, 500)
    position = torch.cat([positions.detach(), torch.randn(anywhere, 3, dtype=torch.float64)]).to(device)
    value = torch.randn(len(position), (lmax + 1) ** 2, channels, dtype=torch.float64).to(device)

    def run(function, dtype: torch.dtype) -> dict:
        return derivatives(function, value.to(dtype), position.to(dtype), constants_on(device, lmax, dtype))

    exact = run(dense_contraction_reference, torch.float64)
    reference, ours, again = (
        run(f, torch.float32) for f in (dense_contraction_reference, axis_aligned_contraction, axis_aligned_contraction)
    )
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    for name, t in exact.items():
        error, budget = (float((found[name].double() - t).norm() / t.norm()) for found in (ours, reference))
        assert error <= 2 * budget + 1e-6, (name, error, budget)


def test_tiny_positions_in_float32(device: str) -> None:
    """Squares of such numbers vanish or lose their digits in float32: the frame stays a rotation."""
    constants = constants_on(device, 2)
    position = torch.tensor([[1e-22, 1e-3, 1e-22], [3e-23, 4e-23, 0], [1e-30, -1.0, 1e-20]]).to(device)
    value = torch.randn(3, 9, 4).to(device)
    found = axis_aligned_contraction(value, position, constants)
    exact = dense_contraction_reference(value.double(), position.double(), constants)
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 2e-6, error


@interpreted
def test_wrong_arguments_are_named(make, positions) -> None:
    nodes = len(positions)
    with pytest.raises(ValueError, match="value"):
        axis_aligned_contraction(make(nodes, 8, 3), positions, constants_of(2))
    with pytest.raises(ValueError, match="position"):
        axis_aligned_contraction(make(nodes - 1, 9, 3), positions, constants_of(2))
