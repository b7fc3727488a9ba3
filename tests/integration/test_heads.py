"""Heads: what they return, exact and reproducible sums, derivatives, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from e2former_fairchem.nn.readouts import LinearForce, PaiNNForce
from e2former_fairchem.segments import gather_rows, segment_sum

OURS = "e2former_fairchem.heads"


def transpose_of(index: torch.Tensor, rows: int):
    order = torch.argsort(index, stable=True)
    return lambda: (order, torch.searchsorted(index[order], torch.arange(rows + 1)))


@pytest.mark.parametrize(("rows", "entries"), [(5, 17), (1, 6), (4, 0), (9, 3)])
@pytest.mark.parametrize("width", [(), (3,), (2, 2)])
def test_gather_and_sum_are_adjoint_and_differentiable(rows: int, entries: int, width: tuple) -> None:
    generator = torch.Generator().manual_seed(rows + entries)
    index = torch.randint(rows, (entries,), generator=generator)
    transpose = transpose_of(index, rows)
    x = torch.randn(rows, *width, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(entries, *width, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.equal(gather_rows(x, index, transpose), x[index])
    expected = torch.zeros_like(x).index_add(0, index, y)
    torch.testing.assert_close(segment_sum(y, index, transpose), expected)

    def both(x, y):
        return gather_rows(x.sin(), index, transpose).square(), segment_sum(y.sin(), index, transpose).square()

    assert torch.autograd.gradcheck(both, (x, y))
    assert torch.autograd.gradgradcheck(both, (x, y))


@pytest.mark.parametrize("prefix", [None, "omol"])
def test_names_and_wrapping(prefix: str | None, build, batch_of, structures) -> None:
    name = (lambda key: f"omol_{key}") if prefix else (lambda key: key)
    data = batch_of(structures["ethanol"], structures["crystal"])
    shapes = {"energy": (2,), "forces": (11, 3), "stress": (2, 9)}
    for wrap in (True, False):
        heads = {"h": {"module": f"{OURS}.E2FormerV2GradientHead", "prefix": prefix, "wrap_property": wrap}}
        out = build(heads, regress_stress=True)(data.clone())
        assert set(out) == {name(key) for key in shapes}
        for key, shape in shapes.items():
            value = out[name(key)][key] if wrap else out[name(key)]
            assert value.shape == shape
    wrapped = build(heads | {"h": {**heads["h"], "wrap_property": True}})(data)[name("energy")]
    assert set(wrapped) == {"energy", "atom_energy"}


def test_energy_is_a_float64_sum_of_atomic_energies(build, batch_of, structures) -> None:
    model = build(dtype=torch.float32)
    out = model(batch_of(*structures.values(), dtype=torch.float32))["energy"]
    assert out["energy"].dtype == torch.float64 and out["atom_energy"].dtype == torch.float32
    sizes = [len(atoms) for atoms in structures.values()]
    expected = torch.stack([part.double().sum() for part in out["atom_energy"].split(sizes)])
    torch.testing.assert_close(out["energy"], expected, rtol=1e-14, atol=1e-14)


def test_same_input_same_bits(build, batch_of, structures) -> None:
    model = build(dtype=torch.float32, regress_stress=True)
    data = batch_of(*structures.values(), dtype=torch.float32)
    first, second = model(data.clone()), model(data.clone())
    for key in ("energy", "forces", "stress"):
        assert torch.equal(first[key][key], second[key][key])


def test_energy_and_direct_heads_agree_with_the_gradient_heads_energy(build, batch_of, structures) -> None:
    """The same weights give the same energy under either head; the force heads are of their kind."""
    gradient = build()
    data = batch_of(structures["ethanol"], structures["slab"])
    for kind in ("linear", "painn"):
        heads = {
            "head": {"module": f"{OURS}.E2FormerV2EnergyHead"},
            "force": {"module": f"{OURS}.E2FormerV2DirectForceHead", "kind": kind},
        }
        direct = build(heads, direct_forces=True)
        missing = direct.load_state_dict(gradient.state_dict(), strict=False)
        assert missing.unexpected_keys == [] and all("force" in key for key in missing.missing_keys)
        out = direct(data.clone())
        # to the last digit: on some processors products round differently with gradients of positions
        expected = gradient(data.clone())["energy"]["energy"]
        torch.testing.assert_close(out["energy"]["energy"], expected, rtol=1e-14, atol=0.0)
        assert out["forces"]["forces"].shape == (12, 3)
        assert isinstance(direct.output_heads["force"].force, LinearForce if kind == "linear" else PaiNNForce)


def test_hessian_without_stress(build, batch_of, structures) -> None:
    """Symmetric, with the forces' finite differences as rows; fairchem's own head fails here without a stress task."""
    model = build()
    model.backbone.regress_config.hessian = True
    data = batch_of(structures["water"])
    hessian = model(data.clone())["hessian"]["hessian"]
    assert hessian.shape == (1, 9, 9)
    scale = float(hessian.detach().abs().max())
    torch.testing.assert_close(hessian, hessian.mT, rtol=0, atol=1e-9 * scale)
    model.backbone.regress_config.hessian = False
    step = 1e-4
    for column in (0, 4, 8):
        forces = []
        for sign in (1, -1):
            moved = data.clone()
            moved["pos"] = data["pos"].clone()
            moved["pos"].view(-1)[column] += sign * step
            forces.append(model(moved)["forces"]["forces"].detach().flatten())
        numeric = -(forces[0] - forces[1]) / (2 * step)
        torch.testing.assert_close(hessian[0, column].detach(), numeric, rtol=0, atol=1e-5 * scale)


def test_graph_is_kept_only_for_training(build, batch_of, structures) -> None:
    data = batch_of(structures["water"])
    model = build()
    assert not model(data.clone())["forces"]["forces"].requires_grad
    assert model.train()(data.clone())["forces"]["forces"].requires_grad


def test_finite_systems_have_no_stress(build, batch_of, structures) -> None:
    """fairchem completes a molecule's empty cell to 1 Å vectors, whose volume means nothing."""
    out = build(regress_stress=True)(batch_of(structures["ethanol"], structures["crystal"]))["stress"]["stress"]
    assert float(out[0].abs().max()) == 0.0 and float(out[1].abs().max()) > 0.0


def test_refusals(build, batch_of, structures) -> None:
    with pytest.raises(ValueError, match="direct_forces: expected true in the backbone of e2former_v2_direct"):
        build(f"{OURS}.E2FormerV2DirectForceHead")
    with pytest.raises(ValueError, match="direct_forces: expected false in the backbone of e2former_v2_gradient"):
        build(direct_forces=True)
    with pytest.raises(ValueError, match=r"kind: expected one of \['linear', 'painn'\], got 'escn'"):
        build({"f": {"module": f"{OURS}.E2FormerV2DirectForceHead", "kind": "escn"}}, direct_forces=True)
    with pytest.raises(TypeError, match=r"e2former_v2_energy_head: unknown key 'reduce'.*expected backbone, prefix"):
        build({"e": {"module": f"{OURS}.E2FormerV2EnergyHead", "reduce": "mean"}})


def test_hessian_refusals(build, batch_of, structures) -> None:
    model = build()
    regress = model.backbone.regress_config
    regress.hessian = True
    with pytest.raises(ValueError, match="hessian: expected a batch of 1 structure, got 2"):
        model(batch_of(structures["water"], structures["atom"]))
    regress.hessian_vmap = True
    with pytest.raises(ValueError, match="hessian_vmap: expected false"):
        model(batch_of(structures["water"]))
