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

ROUNDING = 2.0**-11
SHAPE = {"lmax": 1, "sphere_channels": 8, "num_layers": 1, "num_heads": 4, "head_dim": 4, "num_radial_basis": 8}


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest, matmul_precision: Callable[[str], None]) -> str:
    matmul_precision(request.param)
    return request.param


def network(device: str, backend: str = "triton", seed: int = 0) -> E2FormerV2:
    torch.manual_seed(seed)
    return E2FormerV2(E2FormerV2Config(**SHAPE, max_num_elements=10, kernel_backend=backend)).to(device).eval()


def features(model: E2FormerV2, graph: bool = False) -> Tensor:
    on = one(model).device
    pos = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.1], [0.9, 0.3, -0.4]], device=on).requires_grad_()
    zeros, numbers = torch.zeros(3, dtype=torch.long, device=on), torch.tensor([8, 1, 1], device=on)
    cell, pbc = torch.eye(3, device=on).unsqueeze(0), torch.zeros(1, 3, dtype=torch.bool, device=on)
    edges = build_graph(pos.to(one(model).dtype), cell, pbc, zeros, torch.tensor([3], device=on), 6.0)
    found = model(numbers, zeros[:1], zeros[:1], zeros, pos, edges)
    return found if graph else found.detach()


def settled(model: E2FormerV2, times: int = 2) -> Tensor:
    """Features after enough evaluations for splines, and on a GPU for a CUDA graph that is replayed."""
    for _ in range(6 if one(model).is_cuda else times):
        found = features(model)
    return found


def assert_right(model: E2FormerV2, name: str = "", before: Tensor | None = None) -> None:
    """The numbers of the reference with the weights that the model has now, and far from those of other weights."""
    with torch.random.fork_rng():
        exact = network("cpu", "reference").double()
    exact.load_state_dict(model.state_dict())
    expected = features(exact).float()
    limit = float(expected.abs().max()) * (8 * ROUNDING if torch.get_float32_matmul_precision() == "high" else 1e-5)
    found = features(model).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=limit, msg=lambda text: f"{name}: {text}")
    assert before is None or float((before.cpu() - expected).abs().max()) > 4 * limit, f"{name}: too little changed"


def one(model: E2FormerV2) -> nn.Parameter:
    return model.blocks[0].feedforward.linear1.weight


def step(model: E2FormerV2, _: nn.Parameter) -> None:
    model.unfreeze()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    features(model, graph=True).sum().backward()
    optimizer.step()
    model.freeze()


def step_of_a_frozen_model(model: E2FormerV2, _: nn.Parameter) -> None:
    """An optimiser that holds the parameters from before, with gradients that came otherwise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters():
        p.grad = 0.3 * torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()


def written(write: Callable[[nn.Parameter], object]) -> Callable[[E2FormerV2, nn.Parameter], None]:
    def change(_: E2FormerV2, weight: nn.Parameter) -> None:
        with torch.no_grad():
            write(weight)

    return change


def averaged(model: E2FormerV2, _: nn.Parameter) -> None:
    """fairchem's way of swapping in averaged weights."""
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(network(one(model).device, seed=3))
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
    "load_state_dict": lambda model, _: model.load_state_dict(network("cpu", seed=1).state_dict()),
    "load_state_dict of a layer": lambda model, _: model.blocks.load_state_dict(
        network("cpu", seed=2).blocks.state_dict()
    ),
    "optimiser": step,
    "optimiser of a frozen model": step_of_a_frozen_model,
    "average": averaged,
    "data = data.t()": written(lambda w: setattr(w, "data", w.data.transpose(1, 2))),
    "another parameter": replace,
}


def test_changed_weights_are_noticed(precision: str, device: str) -> None:
    """Through references from before the freeze, too. One model has all changes; a GPU replays in between."""
    model = network(device)
    weight = one(model)
    held = weight.data
    model.freeze()
    before = settled(model)
    held.mul_(-1)  # an alias of the memory, through which autograd's version counter sees nothing
    assert_right(model, "an alias", before)
    for name, change in CHANGES.items():
        if name == "numpy" and device == "cuda":  # has no view of a GPU's memory
            continue
        before = settled(model, 1)
        taken = {"highest": "frozen", "high": "frozen_half"}[precision] if device == "cpu" else "replayed"
        assert model.execution == taken, name
        change(model, one(model))
        assert_right(model, name, before)


def test_it_is_said(device: str, caplog: pytest.LogCaptureFixture) -> None:
    model = network(device).freeze()
    features(model)
    one(model).data.mul_(2)
    with caplog.at_level(logging.INFO):
        features(model)
    assert "weights have changed since freeze()" in caplog.text


def test_a_model_that_nobody_froze_keeps_nothing(device: str) -> None:
    model = network(device)
    for trained in (True, False):
        model.requires_grad_(trained)
        for _ in range(3):
            features(model)
        assert model.execution == "kernels"
        held = [value for module in model.modules() for value in vars(module).values()]
        assert not any(isinstance(value, (Frozen, Tensor)) for value in held)
        one(model).data.mul_(0.5)
        assert_right(model)


def test_freeze_and_unfreeze_give_back_gradients(device: str) -> None:
    model = network(device)
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
def test_copies_start_with_nothing(how: Callable, device: str) -> None:
    model = network(device).freeze()
    expected = settled(model)
    other = how(model)
    assert other._frozen is not model._frozen and not other._frozen._made
    one(model).data.mul_(2)
    torch.testing.assert_close(features(other), expected)
    assert_right(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, device: str) -> None:
    """Right where there is an implementation, refused by name where there is none."""
    model = network(device).freeze()
    features(model)
    model.to(dtype)
    if dtype == torch.float16 or device == "cuda":
        named = "expected float32 or float64" if dtype == torch.float16 else "float64 on a GPU"
        with pytest.raises(TypeError, match=named):
            features(model)
    else:
        torch.testing.assert_close(
            features(model).float(), features(network(device).double()).float(), rtol=0, atol=1e-5
        )
    model.float()
    torch.testing.assert_close(features(model), features(network(device)), rtol=0, atol=5e-3)


def test_inference_mode(precision: str, device: str) -> None:
    model = network(device).freeze()
    expected = settled(model)
    other = network(device).freeze()
    with torch.inference_mode():
        found = settled(other, 3)
        assert found.is_inference()
    torch.testing.assert_close(found.clone(), expected)
    # with gradients, so not from the same CUDA graph: other roundings where TF32 is allowed
    limit = float(expected.abs().max()) * (8 * ROUNDING if precision == "high" else 1e-5)
    torch.testing.assert_close(features(other), expected, rtol=0, atol=limit)
