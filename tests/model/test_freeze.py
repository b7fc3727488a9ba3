"""What is made of weights lives between freeze() and unfreeze(); weights that change are noticed, however they do."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.frozen import Frozen
from e2former_fairchem.graph import build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_kernels.common.backend import triton_installed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
SHAPE = {"lmax": 1, "sphere_channels": 8, "num_layers": 1, "num_heads": 4, "head_dim": 4, "num_radial_basis": 8}


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> str:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def network(backend: str = "triton", seed: int = 0) -> E2FormerV2:
    torch.manual_seed(seed)
    return E2FormerV2(E2FormerV2Config(**SHAPE, max_num_elements=10, kernel_backend=backend)).eval()


def features(model: E2FormerV2) -> Tensor:
    pos = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.1], [0.9, 0.3, -0.4]]).requires_grad_()
    zeros, numbers = torch.zeros(3, dtype=torch.long), torch.tensor([8, 1, 1])
    cell, pbc = torch.eye(3).unsqueeze(0), torch.zeros(1, 3, dtype=torch.bool)
    graph = build_graph(pos, cell, pbc, zeros, torch.tensor([3]), 6.0)
    return model(numbers, zeros[:1], zeros[:1], zeros, pos, graph).detach()


def assert_right(model: E2FormerV2, name: str = "") -> None:
    """The numbers of the reference with the weights that the model has now."""
    with torch.random.fork_rng():
        exact = network("reference")
    exact.load_state_dict(model.state_dict())
    high = torch.get_float32_matmul_precision() == "high"
    tolerance = {"rtol": 0, "atol": 5e-3 if high else 1e-5}
    torch.testing.assert_close(features(model), features(exact), **tolerance, msg=lambda text: f"{name}: {text}")


def one(model: E2FormerV2) -> nn.Parameter:
    return model.blocks[0].feedforward.linear1.weight


def step(model: E2FormerV2, _: nn.Parameter) -> None:
    model.unfreeze()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    zeros = torch.zeros(3, dtype=torch.long)
    pos = torch.randn(3, 3)
    graph = build_graph(
        pos, torch.eye(3).unsqueeze(0), torch.zeros(1, 3, dtype=torch.bool), zeros, torch.tensor([3]), 6.0
    )
    model(torch.tensor([8, 1, 1]), zeros[:1], zeros[:1], zeros, pos, graph).sum().backward()
    optimizer.step()
    model.freeze()


def written(write: Callable[[nn.Parameter], object]) -> Callable[[E2FormerV2, nn.Parameter], None]:
    def change(_: E2FormerV2, weight: nn.Parameter) -> None:
        with torch.no_grad():
            write(weight)

    return change


def averaged(model: E2FormerV2, _: nn.Parameter) -> None:
    """fairchem's way of swapping in averaged weights."""
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(network(seed=3))
    for mine, theirs in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def replace(model: E2FormerV2, _: nn.Parameter) -> None:
    model.blocks[0].feedforward.linear1.weight = nn.Parameter(torch.randn_like(one(model)), requires_grad=False)


CHANGES = {
    "copy_": written(lambda w: w.copy_(torch.randn_like(w))),
    "data.copy_": written(lambda w: w.data.copy_(torch.randn_like(w))),
    "data.mul_": written(lambda w: w.data.mul_(-1)),
    "data =": written(lambda w: setattr(w, "data", torch.randn_like(w))),
    "an element": written(lambda w: w.data[0, 0, 0].add_(1.0)),
    "exchange": written(lambda w: w.data.copy_(w.data.flip(0).flip(1))),
    "a view": written(lambda w: w.detach().view(-1)[:7].fill_(2.0)),
    "numpy": written(lambda w: w.detach().numpy().__imul__(2.0)),
    "load_state_dict": lambda model, _: model.load_state_dict(network(seed=1).state_dict()),
    "load_state_dict of a layer": lambda model, _: model.blocks.load_state_dict(network(seed=2).blocks.state_dict()),
    "optimiser": step,
    "average": averaged,
    "data = data.t()": written(lambda w: setattr(w, "data", w.data.transpose(1, 2))),
    "another parameter": replace,
}


def test_changed_weights_are_noticed(precision: str) -> None:
    """Through references from before the freeze, too. One model goes through all changes."""
    model = network()
    weight = one(model)
    held = weight.data
    model.freeze()
    for _ in range(2):  # the second evaluation has splines
        before = features(model)
    held.mul_(-1)  # an alias of the memory, through which autograd's version counter sees nothing
    assert (features(model) - before).abs().max() > 1e-3
    assert_right(model, "an alias")
    for name, change in CHANGES.items():
        before = features(model)
        change(model, one(model))
        assert (features(model) - before).abs().max() > 1e-3, name
        assert_right(model, name)
    assert model.execution == {"highest": "frozen", "high": "frozen_half"}[precision]


def test_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = network().freeze()
    features(model)
    one(model).data.mul_(2)
    with caplog.at_level(logging.INFO):
        features(model)
    assert "weights have changed since freeze()" in caplog.text


def test_a_model_that_nobody_froze_keeps_nothing() -> None:
    model = network()
    for trained in (True, False):
        model.requires_grad_(trained)
        for _ in range(3):
            features(model)
        assert model.execution == "kernels"
        held = [value for module in model.modules() for value in vars(module).values()]
        assert not any(isinstance(value, (Frozen, Tensor)) for value in held)
        one(model).data.mul_(0.5)
        assert_right(model)


def test_freeze_and_unfreeze_give_back_gradients() -> None:
    model = network()
    model.norm.requires_grad_(False)
    wanted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in model.freeze().parameters())
    assert [name for name, p in model.unfreeze().named_parameters() if p.requires_grad] == wanted
    model.freeze().train()
    features(model)
    assert model.execution == "kernels"
    model.freeze().requires_grad_(True)  # weights ask for gradients again, behind its back
    features(model)
    assert model.execution == "kernels"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_start_with_nothing(how: Callable) -> None:
    model = network().freeze()
    for _ in range(2):
        expected = features(model)
    other = how(model)
    assert other._frozen is not model._frozen and not other._frozen._made
    one(model).data.mul_(2)
    torch.testing.assert_close(features(other), expected)
    assert_right(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Right where there is an implementation, refused by name where there is none."""
    model = network().freeze()
    features(model)
    model.to(dtype)
    if dtype == torch.float16:
        with pytest.raises(TypeError, match="expected float32 or float64"):
            features(model)
    else:
        torch.testing.assert_close(features(model).float(), features(network().double()).float(), rtol=0, atol=1e-5)
    model.float()
    torch.testing.assert_close(features(model), features(network()), rtol=0, atol=5e-3)


def test_inference_mode(precision: str) -> None:
    model = network().freeze()
    for _ in range(2):
        expected = features(model)
    other = network().freeze()
    with torch.inference_mode():
        for _ in range(3):
            found = features(other)
        assert found.is_inference()
    torch.testing.assert_close(found.clone(), expected)
    torch.testing.assert_close(features(other), expected)
