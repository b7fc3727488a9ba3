"""float16 rows with a factor, as exact as TF32 for rows of any size; frozen weights only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from e2former_kernels.common.backend import Mode
from e2former_kernels.common.half import from_products, half_matrices, half_rows, half_weight, rows_from_products
from e2former_kernels.equivariant_attention import kernels_value
from e2former_kernels.feedforward import gated_feedforward, gated_feedforward_reference
from e2former_kernels.feedforward.half import half_weights as half_feedforward
from e2former_kernels.feedforward.op import Weights
from e2former_kernels.query_key import QueryKeyWeights, query_key
from e2former_kernels.query_key.half import half_weights as half_query_key
from e2former_kernels.query_key.reference import query_key_reference

SIZES = (1.0, 0.0, 1e-30, 1e-9, 1e6, 1e30)  # of rows
ROUNDING = 2.0**-11


def test_rows_of_any_size(device: str) -> None:
    x = (torch.randn(len(SIZES), 5, 7) * torch.tensor(SIZES).view(-1, 1, 1)).to(device)
    rows, factor = half_rows(x)
    assert rows.dtype == torch.float16 and float(rows.abs().max()) <= 1.0
    back = rows.double() * factor.double().view(-1, 1, 1)
    top = x.flatten(1).abs().amax(1).double().view(-1, 1, 1)
    assert bool(((back - x.double()).abs() <= ROUNDING * x.double().abs() + 2.0**-24 * top).all())


@pytest.mark.parametrize("nodes_first", [False, True])
def test_product(nodes_first: bool, device: str) -> None:
    x = (torch.randn(2, 6, 9) * torch.tensor(SIZES).clamp(1e-15, 1e15).view(1, -1, 1)).to(device)
    if nodes_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight, bias = 0.1 * torch.randn(2, 9, 4).to(device), torch.randn(2, 4).to(device)
    rows, (numbers, factors) = half_matrices(x), half_weight(weight)
    products = torch.bmm(rows.numbers, numbers).transpose(0, 1)
    out, biased = (
        from_products(products, rows.factor.t(), factors, x.new_empty(6, 2, 4), b).transpose(0, 1) for b in (None, bias)
    )
    terms = torch.bmm(x.double().abs(), weight.double().abs())
    error = (out.double() - torch.bmm(x.double(), weight.double())).abs()
    assert bool((error <= 4 * ROUNDING * terms).all())
    torch.testing.assert_close(biased, out + bias.unsqueeze(1))


@pytest.mark.parametrize(
    ("paths", "channels"), [((5, 7), 6), ((5, 7), kernels_value.LARGEST_CONTRACTION // 5), ((154, 200), 6)]
)
def test_contraction(paths: tuple[int, int], channels: int, device: str) -> None:
    """Rows of a contraction, also where a program cannot hold them all, or the matrix."""
    matrix = torch.randn(*paths).to(device)
    x = (torch.randn(len(SIZES), paths[1], channels) * torch.tensor(SIZES).view(-1, 1, 1)).to(device)
    rows, factor = kernels_value.contract_rows(matrix, x, "tf32x3")
    expected = torch.einsum("pk,nkc->npc", matrix.double(), x.double())
    back = rows.double() * factor.double().view(-1, 1, 1)
    error = (back - expected).abs().flatten(1).amax(1)
    assert bool((error <= 2 * ROUNDING * expected.abs().flatten(1).amax(1)).all())


@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_products(biased: bool, device: str) -> None:
    """Products as rows again: what one gets from them as float32 and then as rows."""
    products, groups = torch.randn(6, 4, 5).half().to(device), torch.rand(4).to(device) + 0.5
    factor, bias = torch.tensor(SIZES).clamp(1e-15, 1e15).to(device), torch.randn(4, 5).to(device) if biased else None
    wide = from_products(products, factor, groups, torch.empty(6, 4, 5, device=device), bias)
    found, expected = rows_from_products(products, factor, groups, bias), half_rows(wide)
    torch.testing.assert_close(found.factor, expected.factor)
    torch.testing.assert_close(found.numbers, expected.numbers, rtol=0, atol=ROUNDING)
    together = from_products(products, factor, groups, torch.empty_like(wide), bias, wide)
    torch.testing.assert_close(together, 2 * wide)


def weights(degrees: int, channels: int, width: int, outputs: int) -> QueryKeyWeights:
    def make(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    return QueryKeyWeights(
        make(degrees, 4 * width, channels, scale=channels**-0.5),
        make(2 * width),
        make(2, width, degrees * width),
        make(2, width),
        1.0 + make(2, width),
        make(2, width),
        make(2, outputs, width),
        make(2, outputs),
    )


def sizes_of(nodes: int, each: Sequence[float]) -> torch.Tensor:
    """A factor for each atom, [nodes, 1, 1]."""
    return torch.tensor(each, dtype=torch.float64).repeat(-(-max(nodes, 1) // len(each)))[:nodes].view(-1, 1, 1)


def check_roundings(
    run: Callable[[torch.dtype, bool], Sequence[torch.Tensor]], device: str, precise: Callable[[str], None]
) -> None:
    """Each atom's numbers are within a few roundings of float64, and together they are as good as TF32's.

    run(dtype, half) gives them, of the reference without ``half``. Only a GPU has TF32, for more than a few rows.
    """

    def errors(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            (t.double() - e).flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1).clamp(min=1e-300)
            for t, e in zip(found, exact, strict=True)
        ]

    exact = run(torch.float64, False)
    ours = errors(run(torch.float32, True))
    assert all(bool((error <= 8 * ROUNDING).all()) for error in ours)
    if device == "cuda" and len(ours[0]) >= 37:
        precise("high")
        for error, budget in zip(ours, errors(run(torch.float32, False)), strict=True):
            assert float(error.norm()) <= 2 * float(budget.norm())


@pytest.mark.usefixtures("as_in_large_graphs")
def test_query_key_in_several_runs(device: str, matmul_precision: Callable[[str], None]) -> None:
    test_query_key(37, device, matmul_precision)


@pytest.mark.parametrize("nodes", [0, 1, 37])
def test_query_key(nodes: int, device: str, matmul_precision: Callable[[str], None]) -> None:
    """Queries, keys and the gradient, however large an atom's features are."""
    channels, width, outputs = (32, 16, 24) if device == "cpu" else (256, 64, 256)
    given = weights(3, channels, width, outputs)
    h = torch.randn(nodes, 9, channels, dtype=torch.float64) * sizes_of(nodes, (1.0, 1e-9, 1e6, 0.0))
    grad = torch.randn(nodes, 2, outputs, dtype=torch.float64)

    def run(dtype: torch.dtype, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, cast = h.to(device, dtype).requires_grad_(), QueryKeyWeights(*(w.to(device, dtype) for w in given))
        y = query_key(x, cast, prepared=half_query_key(cast)) if half else query_key_reference(x, cast)
        (by_h,) = torch.autograd.grad(y, x, grad.to(device, dtype))
        return y.detach(), by_h

    check_roundings(run, device, matmul_precision)


def feedforward_weights(degrees: int, channels: int) -> list[torch.Tensor]:
    def make(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    square, scale = (degrees, channels, channels), channels**-0.5
    return [
        1.0 + make(degrees, channels),
        make(channels),
        make(*square, scale=scale),
        make(channels),
        make(degrees * channels, channels, scale=scale),
        make(degrees * channels),
        make(*square, scale=scale),
        make(channels),
    ]


@pytest.mark.parametrize(("residual", "power"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("nodes", "lmax"), [(0, 2), (1, 1), (37, 2), (5, 4)])
def test_feedforward(
    nodes: int, lmax: int, residual: bool, power: bool, device: str, matmul_precision: Callable[[str], None]
) -> None:
    """The result and the gradient, however large an atom's features are."""
    channels = 24 if device == "cpu" else 256
    given = feedforward_weights(lmax + 1, channels)
    spectrum = 0.5 * torch.randn(channels, lmax * channels, dtype=torch.float64) / (lmax * channels) ** 0.5
    features = torch.randn(nodes, (lmax + 1) ** 2, channels, dtype=torch.float64)
    grad = torch.randn_like(features) * sizes_of(nodes, (1.0, 1e-9, 1e6))
    features *= sizes_of(nodes, (1.0, 1e-9, 1e6, 0.0))

    def run(dtype: torch.dtype, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, cast = features.to(device, dtype).requires_grad_(), [w.to(device, dtype) for w in given]
        options = {"residual": residual, "power_weight": spectrum.to(device, dtype) if power else None}
        if half:
            prepared = half_feedforward(Weights(*cast, options["power_weight"]), torch.get_float32_matmul_precision())
            y = gated_feedforward(x, *cast, **options, prepared=prepared)
        else:
            y = gated_feedforward_reference(x, *cast, **options)
        (by_x,) = torch.autograd.grad(y, x, grad.to(device, dtype))
        return y.detach(), by_x

    check_roundings(run, device, matmul_precision)


def test_prepared_weights_need_no_gradients(device: str) -> None:
    x = torch.randn(3, 4, 8).to(device)
    given = [w.float().to(device) for w in feedforward_weights(2, 8)]
    prepared = half_feedforward(Weights(*given), "highest")
    trained = Mode(trained=True)
    with pytest.raises(ValueError, match="prepared: expected None where weights are trained"):
        gated_feedforward(x, *given, prepared=prepared, mode=trained)
    given = QueryKeyWeights(*(w.float().to(device) for w in weights(2, 8, 4, 8)))
    with pytest.raises(ValueError, match="prepared: expected None where weights are trained"):
        query_key(x, given, prepared=half_query_key(given), mode=trained)
