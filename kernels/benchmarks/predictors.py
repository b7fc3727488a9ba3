"""fairchem's predict units with random weights: eSCN-MD of UMA-S's shape, and our network behind the same interface."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from workload import PAPER, ROOT, TINY, System, water_cluster

BACKBONES = ROOT / "e2former_fairchem" / "configs" / "backbone"
#: UMA-S's eSCN-MD without experts, conserving: 6.3 M parameters with its head.
UMA_S = {
    "model": "fairchem.core.models.uma.escn_md.eSCNMDBackbone", "max_num_elements": 100, "sphere_channels": 128,
    "lmax": 2, "mmax": 2, "otf_graph": True, "max_neighbors": 300, "cutoff": 6.0, "edge_channels": 128,
    "distance_function": "gaussian", "num_distance_basis": 64, "direct_forces": False, "regress_forces": True,
    "regress_stress": False, "num_layers": 4, "hidden_channels": 128, "norm_type": "rms_norm_sh", "act_type": "gate",
    "ff_type": "spectral", "chg_spin_emb_type": "rand_emb", "cs_emb_grad": True, "dataset_mapping": {"omol": "omol"},
}  # fmt: skip
UMA_HEADS = {"efs": {"module": "fairchem.core.models.uma.escn_md.MLP_EFS_Head", "prefix": "omol"}}
UMA_TINY = {"sphere_channels": 8, "edge_channels": 8, "num_distance_basis": 8, "num_layers": 1, "hidden_channels": 8}
OURS = "e2former_fairchem.backbone.E2FormerV2Backbone"
CONSERVING = {"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead", "prefix": "omol"}}
DIRECT = {
    "energy": {"module": "e2former_fairchem.heads.E2FormerV2EnergyHead", "prefix": "omol"},
    "forces": {"module": "e2former_fairchem.heads.E2FormerV2DirectForceHead", "prefix": "omol", "kind": "linear"},
}
#: Scale of energies and forces, so that a random network's forces do not tear the molecules apart in a few steps.
RMSD = 1e-3


def tasks() -> list[dict[str, Any]]:
    """omol_energy and omol_forces as fairchem's checkpoints describe them."""
    unit = "fairchem.core.units.mlip_unit.mlip_unit"
    normalizer = "fairchem.core.modules.normalization.normalizer.Normalizer"
    return [
        {
            "_target_": f"{unit}.Task",
            "name": f"omol_{name}",
            "level": level,
            "property": name,
            "out_spec": {"_target_": f"{unit}.OutputSpec", "dim": dim, "dtype": "float32"},
            "normalizer": {"_target_": normalizer, "mean": 0.0, "rmsd": RMSD},
            "datasets": ["omol"],
        }
        for name, level, dim in (("energy", "system", [1]), ("forces", "atom", [3]))
    ]


def escn(tiny: bool = False) -> tuple[str, dict, dict]:
    """Model class, backbone and heads of eSCN-MD."""
    return "fairchem.core.models.base.HydraModel", UMA_S | (UMA_TINY if tiny else {}), UMA_HEADS


def ours(name: str, tiny: bool = False, **changes: Any) -> tuple[str, dict, dict]:
    """``paper``: the paper's network, conserving; otherwise a file of e2former_fairchem/configs/backbone."""
    if name == "paper":
        backbone = {"model": OURS, **PAPER, "dataset_mapping": {"omol": "omol"}}
    else:
        base, own = (yaml.safe_load((BACKBONES / f"{file}.yaml").read_text()) for file in ("e2former_v2", name))
        backbone = base | {key: value for key, value in own.items() if key != "defaults"}
    if tiny:
        backbone |= TINY
    backbone |= changes
    heads = DIRECT if backbone.get("direct_forces") else CONSERVING
    return "e2former_fairchem.hydra_model.E2FormerV2HydraModel", backbone, heads


def settings_of(compiled: bool = False, given_edges: bool = False) -> Any:
    """fairchem's default inference settings (TF32, merged experts), compiled or not.

    ``umas_fast_gpu`` is what fairchem itself chooses for this shape on a GPU. given_edges: take the data's.
    """
    from fairchem.core.units.mlip_unit.api.inference import inference_settings_multigpu

    # the stress task that fairchem adds by itself would be timed for one model and not for the other
    return replace(
        inference_settings_multigpu(),
        compile=compiled,
        external_graph_gen=given_edges,
        auto_add_default_untrained_tasks=False,
    )


def predict_unit(model: tuple[str, dict, dict], device: str, settings: Any) -> Any:
    """MLIPPredictUnit of a model with random weights, from a checkpoint file as fairchem writes them."""
    from fairchem.core.units.mlip_unit import MLIPPredictUnit
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    target, backbone, heads = model
    config = {"_target_": target, "backbone": backbone, "heads": heads, "pass_through_head_outputs": True}
    torch.manual_seed(0)
    weights = hydra.utils.instantiate(config).state_dict()
    averaged = {"n_averaged": torch.tensor(1)} | {f"module.{k}": v for k, v in weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        torch.save(MLIPInferenceCheckpoint(config, weights, averaged, OmegaConf.create(tasks())), path)
        return MLIPPredictUnit(str(path), device, inference_settings=settings)


def parameters_of(unit: Any) -> int:
    return sum(p.numel() for p in unit.model.parameters())


def batch_of(system: System) -> Any:
    """A cluster as fairchem's batch of one, on the system's device, with the edges given."""
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

    data = AtomicData.from_ase(cluster(system.atoms), r_data_keys=["spin", "charge"], task_name="omol")
    data.edge_index = torch.stack([system.source, system.target]).cpu()
    data.cell_offsets = torch.zeros(system.edges, 3)
    data.nedges = torch.tensor([system.edges])
    batch = atomicdata_list_to_batch([data]).to(system.pos.device)
    if batch.edge_index.shape[1] != system.edges:
        raise RuntimeError(f"edges: expected {system.edges} in the batch, got {batch.edge_index.shape[1]}")
    return batch


def cluster(atoms: int) -> Any:
    """The benchmarks' water cluster as ASE atoms, neutral singlet, with velocities of 300 K."""
    from ase import Atoms
    from ase.md.velocitydistribution import thermalize_momenta

    positions, numbers = water_cluster(atoms // 3)
    found = Atoms(numbers, positions)
    found.info.update(charge=0, spin=1)
    thermalize_momenta(found, 300, rng=np.random.default_rng(0))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without fairchem's warnings about precision and settings, one or more for every predict unit."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def execution_mode(unit: Any) -> str:
    """The mode that runs, for the record."""
    mode = unit.inference_settings.execution_mode
    return str(getattr(mode, "value", mode) or "general")
