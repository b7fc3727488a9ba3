"""The backbone as fairchem sees it: keys, interface, gradients, fairchem's own heads, optimiser groups."""

from __future__ import annotations

import inspect
import logging
from functools import partial

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.models.base import BackboneInterface, HydraModel
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task, _get_optimizer_wd
from omegaconf import OmegaConf

import e2former_fairchem
from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.heads import E2FormerV2DirectForceHead, E2FormerV2EnergyHead, E2FormerV2GradientHead
from e2former_fairchem.hydra_model import E2FormerV2HydraModel

UMA = "fairchem.core.models.uma.escn_md"
OURS = "e2former_fairchem.heads"
DESIGN_KEYS = """
    lmax sphere_channels num_layers num_heads head_dim num_radial_basis radial_width value_multiplicity
    edge_layer_norm inverse_distance cutoff max_neighbors score message_order attention_norm envelope_exponent
    atom_embedding reflection_equivariant power_spectrum divide_charge long_range convolution
    kernel_backend activation_checkpointing cuda_graph otf_graph max_num_elements direct_forces regress_forces
    regress_stress dataset_mapping strict_elements
""".split()
DIRECT = {
    "energy": {"module": f"{OURS}.E2FormerV2EnergyHead"},
    "forces": {"module": f"{OURS}.E2FormerV2DirectForceHead", "kind": "painn"},
}


def task(name: str, datasets: list[str], prop: str | None = None) -> Task:
    return Task(
        name=name,
        level="system",
        property=prop or name.rsplit("_", 1)[-1],
        out_spec=OutputSpec(dim=[1], dtype="float32"),
        normalizer=Normalizer(mean=0.0, rmsd=1.0),
        datasets=datasets,
    )


def test_short_names_are_registered() -> None:
    names = {
        "e2former_v2": E2FormerV2Backbone,
        "e2former_v2_energy_head": E2FormerV2EnergyHead,
        "e2former_v2_direct_force_head": E2FormerV2DirectForceHead,
        "e2former_v2_gradient_head": E2FormerV2GradientHead,
    }
    for name, cls in names.items():
        assert registry.get_model_class(name) is cls
        assert registry.get_model_class(f"{cls.__module__}.{cls.__qualname__}") is cls
    assert e2former_fairchem.__version__.count(".") >= 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = e2former_fairchem.nothing


def test_keys_are_those_of_the_design() -> None:
    keys = [
        name
        for name, parameter in inspect.signature(E2FormerV2Backbone.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    assert sorted(keys) == sorted(DESIGN_KEYS)
    assert "mmax" not in keys, "fairchem takes a key of that name for UMA"


def test_interface_and_output(build, batch_of, structures) -> None:
    model = build()
    backbone = model.backbone
    assert isinstance(backbone, BackboneInterface) and isinstance(model, HydraModel)
    assert not BackboneInterface.__abstractmethods__ - set(dir(backbone))
    data = batch_of(*structures.values())
    out = backbone(data)
    atoms = sum(len(a) for a in structures.values())
    assert out["node_embedding"].shape == (atoms, 9, 16) and bool(torch.isfinite(out["node_embedding"]).all())
    assert torch.equal(data["batch_full"], data["batch"])
    assert torch.equal(data["atomic_numbers_full"], data["atomic_numbers"])
    assert (backbone.lmax, backbone.sphere_channels, backbone.hidden_channels) == (2, 16, 16)
    assert (backbone.cutoff, backbone.max_neighbors) == (5.0, None)
    assert backbone.num_params == sum(p.numel() for p in backbone.parameters())


def test_yaml_lists_and_mappings(build, batch_of, structures) -> None:
    """Keys as Hydra hands them over: OmegaConf nodes."""
    options = {"message_order": [1, 0], "long_range": {"layers": 1, "lower": 0.5, "upper": 8.0, "envelope": "bell"}}
    plain, yaml = build(**options), build(**OmegaConf.create(options))
    data = batch_of(structures["ethanol"], structures["crystal"])
    assert torch.equal(plain(data.clone())["energy"]["energy"], yaml(data.clone())["energy"]["energy"])
    assert yaml.backbone.config.message_order == (1, 0) and yaml.backbone.config.long_range.layers == 1


def test_given_edges_replace_the_search(build, batch_of, structures) -> None:
    model = build()
    data = batch_of(structures["crystal"], structures["slab"])
    expected = model(data.clone())
    _, _, graph, _ = model.backbone.prepare(data.clone())
    given = data.clone()
    given["edge_index"] = torch.stack([graph.source, graph.target]).flip(1)
    given["cell_offsets"] = graph.offset.flip(0).double()
    model.backbone.otf_graph = False
    found = model(given)
    for key in ("energy", "forces"):
        assert torch.equal(found[key][key], expected[key][key])
    fewer = data.clone()
    fewer["edge_index"], fewer["cell_offsets"] = given["edge_index"][:, ::2], given["cell_offsets"][::2]
    assert not torch.allclose(model(fewer)["energy"]["energy"], expected["energy"]["energy"])


@pytest.mark.parametrize("head", ["MLP_EFS_Head", "ours"])
def test_fairchems_gradient_head_agrees_with_finite_differences(head: str, build, batch_of, structures) -> None:
    path = f"{OURS}.E2FormerV2GradientHead" if head == "ours" else f"{UMA}.{head}"
    model = build(path, regress_stress=True)
    data = batch_of(structures["crystal"])
    out = model(data.clone())
    forces, stress = out["forces"]["forces"], out["stress"]["stress"].reshape(3, 3)
    step, numeric = 1e-4, torch.zeros_like(forces)

    def energy(displacement: torch.Tensor, strain: torch.Tensor) -> float:
        moved = data.clone()
        deform = torch.eye(3, dtype=torch.float64) + strain
        moved["pos"] = (data["pos"] + displacement) @ deform
        moved["cell"] = data["cell"] @ deform
        return float(model(moved)["energy"]["energy"].detach())

    none = torch.zeros(3, 3, dtype=torch.float64)
    for atom in range(2):
        for axis in range(3):
            shift = torch.zeros_like(forces)
            shift[atom, axis] = step
            numeric[atom, axis] = -(energy(shift, none) - energy(-shift, none)) / (2 * step)
    torch.testing.assert_close(forces.detach(), numeric, rtol=0, atol=1e-5 * float(forces.detach().abs().max()))
    volume = float(torch.linalg.det(data["cell"][0]).abs())
    for i, j in [(0, 0), (1, 2), (0, 2)]:
        strain = none.clone()
        strain[i, j] += 0.5 * step
        strain[j, i] += 0.5 * step
        rest = torch.zeros_like(forces)
        slope = (energy(rest, strain) - energy(rest, -strain)) / (2 * step * volume)
        assert abs(slope - float(stress[i, j].detach())) < 1e-5 * float(stress.detach().abs().max())


def test_fairchems_other_heads_run(build, batch_of, structures) -> None:
    """UMA's energy, force and stress heads read what our backbone offers; forces follow a rotation (e3nn's order)."""
    heads = {
        "energy": {"module": f"{UMA}.MLP_Energy_Head", "wrap_property": True},
        "force": {"module": f"{UMA}.Linear_Force_Head"},
        "stress": {"module": f"{UMA}.MLP_Stress_Head"},
    }
    model = build(heads, direct_forces=True)
    data = batch_of(structures["ethanol"], structures["water"])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    turn = turn * torch.linalg.det(turn)
    turned = data.clone()
    turned["pos"] = data["pos"] @ turn.T
    out, after = model(data), model(turned)
    assert out["energy"]["energy"].shape == (2,) and out["forces"].shape == (12, 3) and out["stress"].shape == (2, 9)
    torch.testing.assert_close(after["energy"]["energy"], out["energy"]["energy"], rtol=1e-10, atol=1e-10)
    scale = float(out["forces"].detach().abs().max())
    assert scale > 1e-6
    torch.testing.assert_close(after["forces"] / scale, out["forces"] @ turn.T / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", ["MLP_EFS_Head", "ours"])
def test_systems_without_edges(head: str, build, batch_of, structures) -> None:
    path = f"{OURS}.E2FormerV2GradientHead" if head == "ours" else f"{UMA}.{head}"
    model = build(path, regress_stress=True)
    out = model(batch_of(structures["atom"]))
    assert bool(torch.isfinite(out["energy"]["energy"]).all())
    assert float(out["forces"]["forces"].abs().max()) == 0.0 and float(out["stress"]["stress"].abs().max()) == 0.0
    mixed = model(batch_of(structures["atom"], structures["ethanol"]))
    torch.testing.assert_close(mixed["energy"]["energy"][:1], out["energy"]["energy"])


def test_gradients_are_switched_on_only_where_needed(build, batch_of, structures) -> None:
    """fairchem evaluates under no_grad: conserving forces still come out, direct models build no graph."""
    data = batch_of(structures["water"])
    with torch.no_grad():
        conserving = build()(data.clone())
        assert float(conserving["forces"]["forces"].detach().abs().max()) > 1e-6
        direct = build(DIRECT, direct_forces=True)(data)
    assert not direct["forces"]["forces"].requires_grad and not data["pos"].requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "qk_dot", "activation_checkpointing": True},
        {"score": "qk_dot_scalar", "long_range": {"layers": 1, "upper": 8.0}},
        {"message_order": 0, "convolution": "on_the_fly"},
        {"direct_forces": True},
    ],
    ids=["default", "qk_dot", "long_range", "order_0", "direct"],
)
@pytest.mark.parametrize("system", ["ethanol", "atom"])
def test_every_parameter_gets_a_gradient(options: dict, system: str, build, batch_of, structures) -> None:
    """Plain DDP, which fairchem uses, stops at an unused parameter; a batch may consist of isolated atoms."""
    model = build(DIRECT if "direct_forces" in options else f"{OURS}.E2FormerV2GradientHead", **options).train()
    out = model(batch_of(structures[system]))
    (out["energy"]["energy"].sum() + out["forces"]["forces"].square().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_ddp_takes_two_steps(build, batch_of, structures, tmp_path) -> None:
    """Without find_unused_parameters, as fairchem wraps its models; force losses differentiate twice."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(build(dtype=torch.float32).train())
        optimiser = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
        for names in (("ethanol", "crystal"), ("atom",), ("water",)):
            out = wrapped(batch_of(*(structures[name] for name in names), dtype=torch.float32))
            optimiser.zero_grad()
            (out["energy"]["energy"].sum() + out["forces"]["forces"].square().sum()).backward()
            optimiser.step()
        assert all(bool(torch.isfinite(p).all()) for p in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_ema_copy_predicts_the_same(build, batch_of, structures) -> None:
    model = build(dtype=torch.float32)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    averaged.update_parameters(model)
    data = batch_of(structures["ethanol"], dtype=torch.float32)
    assert torch.equal(averaged(data.clone())["forces"]["forces"], model(data)["forces"]["forces"])
    assert averaged.module.output_heads["head"].regress_config is averaged.module.backbone.regress_config


def test_bf16_autocast_trains(build, batch_of, structures) -> None:
    """Outputs under autocast stay close to float32, energies stay float64, and the graph keeps full precision."""
    model = build(dtype=torch.float32).train()
    data = batch_of(structures["ethanol"], structures["crystal"], dtype=torch.float32)
    exact = model(data.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, graph, _ = model.backbone.prepare(data.clone())
        out = model(data.clone())
        loss = out["energy"]["energy"].sum() + out["forces"]["forces"].square().mean()
    loss.backward()
    _, _, reference, _ = model.backbone.prepare(data.clone())
    assert graph.vec.dtype == torch.float32 and torch.equal(graph.vec, reference.vec)
    assert out["energy"]["energy"].dtype == torch.float64
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    spread = float(exact["energy"]["atom_energy"].detach().abs().max())
    difference = (out["energy"]["atom_energy"] - exact["energy"]["atom_energy"]).detach().abs().max()
    assert float(difference) < 0.1 * spread


def test_weight_decay_groups(build) -> None:
    """Norms, biases and embeddings do not decay, matrices do, in the groups that fairchem's unit makes."""
    model = build(long_range={"layers": 1, "upper": 8.0})
    optimiser = _get_optimizer_wd(partial(torch.optim.AdamW, weight_decay=1e-3), model)
    names = {id(p): name for name, p in model.named_parameters()}
    still, decaying = ({names[id(p)] for p in group["params"]} for group in optimiser.param_groups)
    assert optimiser.param_groups[0]["weight_decay"] == 0 and optimiser.param_groups[1]["weight_decay"] == 1e-3
    assert not still & decaying and still | decaying == set(names.values())
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if parameter.ndim == 1 or "bias" in leaf or "embedding" in name or "norm" in name:
            assert name in still, name
    assert {"output_heads.head.energy.0.weight", "backbone.model.blocks.0.attention.value.weight"} <= decaying
    assert "backbone.model.blocks.0.norm1.affine_weight" in still
    assert set(model.backbone.no_weight_decay()) <= {name.removeprefix("backbone.") for name in still}


def test_inference_settings() -> None:
    settings = InferenceSettings(activation_checkpointing=True, external_graph_gen=True, compile=True)
    assert E2FormerV2Backbone.build_inference_settings(settings) == {
        "activation_checkpointing": False,
        "otf_graph": False,
    }
    assert settings.compile and not settings.hessian_vmap


def test_hessians_switch_compilation_off_and_say_so(caplog) -> None:
    settings = InferenceSettings(compile=True, predict_untrained_hessian={"omol"})
    with caplog.at_level(logging.WARNING):
        E2FormerV2Backbone.build_inference_settings(settings)
    assert not settings.compile and not settings.hessian_vmap
    assert "compile is switched off" in caplog.text and "row by row" in caplog.text


def test_stress_is_the_default_untrained_task(build) -> None:
    backbone = build().backbone
    known = task("omol_energy", ["omol"]), task("omol_forces", ["omol"]), task("energy", ["oc20"])
    tasks = {t.name: t for t in known}
    added = backbone.get_default_untrained_tasks(tasks, InferenceSettings())
    assert [(t.name, t.property, t.datasets, t.inference_only) for t in added] == [
        ("omol_stress", "stress", ["omol"], True)
    ], "oc20 has no conserving forces, so no head differentiates its energy"
    asked = InferenceSettings(predict_untrained_stress={"omol"})
    assert backbone.get_default_untrained_tasks(tasks, asked) == []
    assert build(DIRECT, direct_forces=True).backbone.get_default_untrained_tasks(tasks, InferenceSettings()) == []


def test_dataset_mapping_limits_the_tasks(build) -> None:
    backbone = build(dataset_mapping={"omol": "omol", "omol_extra": "omol"}).backbone
    backbone.validate_tasks({"omol": [], "omol_extra": []})
    with pytest.raises(ValueError, match=r"dataset_mapping.*\['oc20'\] are not among \['omol', 'omol_extra'\]"):
        backbone.validate_tasks({"omol": [], "oc20": []})
    build().backbone.validate_tasks({"anything": []})


def test_truncation_is_said_in_the_log(build, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        build()
        assert "max_neighbors" not in caplog.text
        build(max_neighbors=8)
    assert "max_neighbors=8" in caplog.text and "jump" in caplog.text


def test_plain_hydra_model_has_the_same_state(build) -> None:
    """Our HydraModel adds a method, no state: checkpoints of one load into the other."""
    model = build()
    other = HydraModel(
        backbone={"model": "e2former_v2", "sphere_channels": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4}
        | {"num_radial_basis": 16, "cutoff": 5.0},
        heads={"head": {"module": "e2former_v2_gradient_head"}},
    )
    assert isinstance(model, E2FormerV2HydraModel)
    assert not hasattr(other, "no_weight_decay")
    other.load_state_dict(model.state_dict())
