"""Symmetries, derivatives and smoothness of the network inside fairchem, by the package's own mixins."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairchem.core.models.base import HydraModel

from e2former_fairchem.testing import (
    EquivarianceTests,
    GradientTests,
    PeriodicTests,
    SmoothCutoffTests,
    atomic_data,
    random_molecule,
    water_box,
)

SMALL: dict[str, Any] = {
    "model": "e2former_fairchem.backbone.E2FormerV2Backbone",
    "sphere_channels": 16,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 4,
    "num_radial_basis": 16,
    "cutoff": 5.0,
    "regress_stress": True,
}


def hydra_model(**changes: Any) -> HydraModel:
    """A small conserving model with weights large enough that every term matters."""
    torch.manual_seed(0)
    model = HydraModel(
        backbone={**SMALL, **changes},
        heads={"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead"}},
        pass_through_head_outputs=True,
        supports_single_atoms=True,
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "embedding" in name or "bias" in name:
                # drawn in float64, so that both precisions have the same weights
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


class TestDefault(EquivarianceTests, PeriodicTests, GradientTests, SmoothCutoffTests):
    def build_model(self) -> HydraModel:
        return hydra_model()


class TestReflectionEquivariant(EquivarianceTests):
    reflection = True

    def build_model(self) -> HydraModel:
        return hydra_model(reflection_equivariant=True)


class TestEAAS(EquivarianceTests, PeriodicTests, GradientTests):
    translation_tolerance = 1e-3  # differences of absolute positions

    def build_model(self) -> HydraModel:
        return hydra_model(convolution="eaas")


class TestOrderTwo(EquivarianceTests, PeriodicTests, GradientTests, SmoothCutoffTests):
    reflection = True

    def build_model(self) -> HydraModel:
        return hydra_model(message_order=2, reflection_equivariant=True, power_spectrum=True, divide_charge=True)


class TestOnTheFlyDot(EquivarianceTests, GradientTests, SmoothCutoffTests):
    def build_model(self) -> HydraModel:
        return hydra_model(convolution="on_the_fly", score="qk_dot")


class TestDotScalarLmax3(EquivarianceTests, PeriodicTests, SmoothCutoffTests):
    def build_model(self) -> HydraModel:
        return hydra_model(score="qk_dot_scalar", lmax=3, message_order=[1, 0], envelope_exponent=3)


class TestLongRange(EquivarianceTests, PeriodicTests):
    def build_model(self) -> HydraModel:
        return hydra_model(long_range={"layers": 1, "lower": 0.5, "upper": 7.0, "envelope": "bell"})


@pytest.mark.parametrize("norm", ["softplus", "sigmoid"])
def test_weight_functions_without_a_softmax_are_continuous(norm: str) -> None:
    class Tests(SmoothCutoffTests):
        def build_model(self) -> HydraModel:
            return hydra_model(attention_norm=norm)

    Tests().test_limit_of_the_jump()


def test_the_authors_softmax_jumps() -> None:
    """The check above can fail: docs/network.md, section 14.4 tells of this one."""

    class Tests(SmoothCutoffTests):
        def build_model(self) -> HydraModel:
            return hydra_model(attention_norm="molfm_v1_5")

    with pytest.raises(AssertionError, match="limit of the jump"):
        Tests().test_limit_of_the_jump()


@pytest.mark.parametrize(
    ("lmax", "reflection_equivariant", "order"),
    [*itertools.product([1, 2, 3, 4], [False, True], [1]), (1, False, 2), (2, True, 2), (4, False, 2)],
)
def test_forms_agree(lmax: int, reflection_equivariant: bool, order: int, float64_default: None) -> None:
    """dense, eaas and on_the_fly are one function; so are their derivatives in every parameter."""
    results, changes = {}, {"lmax": lmax, "reflection_equivariant": reflection_equivariant, "message_order": order}
    forms = ("on_the_fly", "eaas", "auto") if order == 1 else ("on_the_fly", "auto")
    for convolution in ("dense", *forms):
        model = hydra_model(convolution=convolution, **changes)
        model.train()
        out = model(atomic_data([random_molecule(), water_box()], torch.float64))
        loss = out["forces"]["forces"].square().sum() + out["energy"]["energy"].square().sum()
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        results[convolution] = [out["energy"]["energy"], out["forces"]["forces"], *grads]
    for convolution in forms:
        for got, expected in zip(results[convolution], results["dense"], strict=True):
            scale = float(expected.detach().abs().max()) + 1e-12
            assert float((got - expected).detach().abs().max()) <= 1e-10 * scale


def test_shares_of_a_charge_add_up() -> None:
    """What charge and spin add does not grow with the number of atoms; a neutral singlet's atoms have all of it."""
    embedding = hydra_model(divide_charge=True, max_num_elements=10).backbone.model.charge_spin.double()
    numbers, batch = torch.tensor([7, 1, 1, 1, 1, 6, 6, 8, 8]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3])
    charge, spin = torch.tensor([1, -1, 0, 0]), torch.tensor([1, 2, 1, 3])
    graph = SimpleNamespace(total=lambda values: values)
    scalars = torch.randn(
        9, embedding.mix.out_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    scalars[2] = scalars[1]
    found = embedding.atoms(charge, spin, numbers, batch, scalars, graph)
    whole, neutral = embedding(charge, spin), embedding(charge[2:3], spin[2:3])
    added = torch.zeros_like(whole).index_add(0, batch, found - neutral)
    torch.testing.assert_close(added, whole - neutral)
    assert torch.equal(found[7], whole[2]) and (whole[[0, 1, 3]] - neutral).abs().amax(1).min() > 0.01
    assert torch.equal(found[1], found[2]), "the same element and surroundings"
    assert not torch.allclose(found[0], found[1], atol=1e-4), "another element"
    assert not torch.allclose(found[1], found[3], atol=1e-4), "other surroundings"
