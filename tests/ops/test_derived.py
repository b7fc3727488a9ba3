"""What is made of frozen weights is made once, and again when they change."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.common.derived import derived


class Doubled:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return 2 * weight


def test_once_for_the_same_numbers() -> None:
    weight, make = torch.randn(3), Doubled()
    first = derived("doubled", weight, make)
    with torch.inference_mode():
        assert derived("doubled", weight, make) is first
    assert make.calls == 1 and not first.is_inference()
    weight += 1
    assert torch.equal(derived("doubled", weight, make), 2 * weight), "numbers that change"
    weight.data = torch.randn(3)
    assert torch.equal(derived("doubled", weight, make), 2 * weight), "another address"
    assert derived("other", weight, lambda w: w.sum()).ndim == 0, "another name"
    assert make.calls == 3


def test_others_count_too() -> None:
    weight, other, make = torch.randn(3), torch.randn(2), Doubled()
    for _ in range(2):
        derived("doubled", weight, make, [other])
    other.zero_()
    derived("doubled", weight, make, [other])
    assert make.calls == 2
    other.requires_grad_()
    for _ in range(2):
        derived("doubled", weight, make, [other])
    assert make.calls == 4


def test_weights_in_training_are_part_of_the_graph() -> None:
    weight = torch.randn(3, requires_grad=True)
    (slope,) = torch.autograd.grad(derived("doubled", weight, Doubled()).sum(), weight)
    assert torch.equal(slope, torch.full((3,), 2.0))
