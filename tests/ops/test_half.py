"""float16 rows with a factor, as exact as TF32 for rows of any size; frozen weights only."""

from __future__ import annotations

import pytest
import torch

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.half import from_products, half_matrices, half_rows, half_weight, rows_from_products
from e2former_kernels.feedforward import gated_feedforward, gated_feedforward_reference
from e2former_kernels.feedforward.half import half_weights as half_feedforward
from e2former_kernels.feedforward.passes import Weights
from e2former_kernels.query_key import QueryKeyWeights, query_key
from e2former_kernels.query_key.half import half_weights as half_query_key
from e2former_kernels.query_key.reference import query_key_reference

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
SIZES = (1.0, 0.0, 1e-30, 1e-9, 1e6, 1e30)  # of rows
ROUNDING = 2.0**-11


def test_rows_of_any_size() -> None:
    x = torch.randn(len(SIZES), 5, 7) * torch.tensor(SIZES).view(-1, 1, 1)
    rows, factor = half_rows(x)
    assert rows.dtype == torch.float16 and float(rows.abs().max()) <= 1.0
    back = rows.double() * factor.double().view(-1, 1, 1)
    top = x.flatten(1).abs().amax(1).double().view(-1, 1, 1)
    assert bool(((back - x.double()).abs() <= ROUNDING * x.double().abs() + 2.0**-24 * top).all())


@pytest.mark.parametrize("nodes_first", [False, True])
def test_product(nodes_first: bool) -> None:
    x = torch.randn(2, 6, 9) * torch.tensor(SIZES).clamp(1e-15, 1e15).view(1, -1, 1)
    if nodes_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight, bias = 0.1 * torch.randn(2, 9, 4), torch.randn(2, 4)
    rows, (numbers, factors) = half_matrices(x), half_weight(weight)
    products = torch.bmm(rows.numbers, numbers).transpose(0, 1)
    out, biased = (
        from_products(products, rows.factor.t(), factors, torch.empty(6, 2, 4), b).transpose(0, 1) for b in (None, bias)
    )
    terms = torch.bmm(x.double().abs(), weight.double().abs())
    error = (out.double() - torch.bmm(x.double(), weight.double())).abs()
    assert bool((error <= 4 * ROUNDING * terms).all())
    torch.testing.assert_close(biased, out + bias.unsqueeze(1))


@pytest.mark.parametrize("widest", [1 << 15, 1])
def test_contraction(widest: int, monkeypatch) -> None:
    """Rows of a contraction, also where a program cannot hold them all."""
    from e2former_kernels.equivariant_attention import primitives

    monkeypatch.setattr(primitives, "LARGEST_CONTRACTION", widest)
    matrix = torch.randn(5, 7)
    x = torch.randn(len(SIZES), 7, 6) * torch.tensor(SIZES).view(-1, 1, 1)
    rows, factor = primitives.contract_rows(matrix, x)
    expected = torch.einsum("pk,nkc->npc", matrix.double(), x.double())
    back = rows.double() * factor.double().view(-1, 1, 1)
    error = (back - expected).abs().flatten(1).amax(1)
    assert bool((error <= 2 * ROUNDING * expected.abs().flatten(1).amax(1)).all())


@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_products(biased: bool) -> None:
    """Products as rows again: what one gets from them as float32 and then as rows."""
    products, groups = torch.randn(6, 4, 5).half(), torch.rand(4) + 0.5
    factor, bias = torch.tensor(SIZES).clamp(1e-15, 1e15), torch.randn(4, 5) if biased else None
    wide = from_products(products, factor, groups, torch.empty(6, 4, 5), bias)
    found, expected = rows_from_products(products, factor, groups, bias), half_rows(wide)
    torch.testing.assert_close(found.factor, expected.factor)
    torch.testing.assert_close(found.numbers, expected.numbers, rtol=0, atol=ROUNDING)
    together = from_products(products, factor, groups, torch.empty(6, 4, 5), bias, wide)
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


@pytest.mark.parametrize("nodes", [0, 1, 37])
def test_query_key(nodes: int) -> None:
    """Each atom's query, key and gradient within a few roundings of float64, however large its features are."""
    given = weights(3, 32, 16, 24)
    h = torch.randn(nodes, 9, 32, dtype=torch.float64)
    h *= torch.tensor([1.0, 1e-9, 1e6, 0.0] * 10, dtype=torch.float64)[:nodes].view(-1, 1, 1)
    grad = torch.randn(nodes, 2, 24, dtype=torch.float64)
    found = []
    for function, dtype in ((query_key, torch.float32), (query_key_reference, torch.float64)):
        x, cast = h.to(dtype).requires_grad_(), QueryKeyWeights(*(w.to(dtype) for w in given))
        options = {"prepared": half_query_key(cast)} if function is query_key else {}
        y = function(x, cast, **options)
        (by_h,) = torch.autograd.grad(y, x, grad.to(dtype))
        found.append((y.detach().double(), by_h.double()))
    for mine, expected in zip(*found, strict=True):
        error = (mine - expected).flatten(1).norm(dim=1)
        assert bool((error <= 8 * ROUNDING * expected.flatten(1).norm(dim=1)).all())


def feedforward_weights(degrees: int, channels: int) -> list[torch.Tensor]:
    def make(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    square, scale = (degrees, channels, channels), channels**-0.5
    return [
        1.0 + make(degrees, channels), make(channels), make(*square, scale=scale), make(channels),
        make(degrees * channels, channels, scale=scale), make(degrees * channels), make(*square, scale=scale),
        make(channels),
    ]  # fmt: skip


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("nodes", "lmax"), [(0, 2), (1, 1), (37, 2), (5, 4)])
def test_feedforward(nodes: int, lmax: int, residual: bool) -> None:
    """Each atom's result and gradient within a few roundings of float64, however large its features are."""
    given = feedforward_weights(lmax + 1, 24)
    x = torch.randn(nodes, (lmax + 1) ** 2, 24, dtype=torch.float64)
    x *= torch.tensor([1.0, 1e-9, 1e6, 0.0] * 10, dtype=torch.float64)[:nodes].view(-1, 1, 1)
    grad = torch.randn_like(x) * torch.tensor([1.0, 1e-9, 1e6] * 13, dtype=torch.float64)[:nodes].view(-1, 1, 1)
    found = []
    for function, dtype in ((gated_feedforward, torch.float32), (gated_feedforward_reference, torch.float64)):
        leaf, cast = x.to(dtype).requires_grad_(), [w.to(dtype) for w in given]
        options = {"prepared": half_feedforward(Weights(*cast))} if function is gated_feedforward else {}
        y = function(leaf, *cast, residual=residual, **options)
        (by_x,) = torch.autograd.grad(y, leaf, grad.to(dtype))
        found.append((y.detach().double(), by_x.double()))
    for mine, expected in zip(*found, strict=True):
        error = (mine - expected).flatten(1).norm(dim=1)
        assert bool((error <= 8 * ROUNDING * expected.flatten(1).norm(dim=1)).all())


def test_prepared_weights_need_no_gradients() -> None:
    given = [w.float() for w in feedforward_weights(2, 8)]
    prepared = half_feedforward(Weights(*given))
    trained = [w.clone().requires_grad_() for w in given]
    with pytest.raises(ValueError, match="prepared: expected None where weights need gradients"):
        gated_feedforward(torch.randn(3, 4, 8), *trained, prepared=prepared)
    given = QueryKeyWeights(*(w.float() for w in weights(2, 8, 4, 8)))
    trained = given._replace(bias=given.bias.clone().requires_grad_())
    with pytest.raises(ValueError, match="prepared: expected None where weights need gradients"):
        query_key(torch.randn(3, 4, 8), trained, prepared=half_query_key(given))
