"""One of two workers of a graph-parallel group: every case on one worker, then on two.

Run by test_graph_parallel.py, a process each. Worker 0 writes, by case, what it found alone and together with worker 1.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ase
import torch
import torch.distributed as dist
from ase.build import bulk, molecule
from fairchem.core.common import gp_utils
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from e2former_fairchem.graph import build_graph
from e2former_fairchem.hydra_model import E2FormerV2HydraModel

SMALL = {
    "model": "e2former_fairchem.backbone.E2FormerV2Backbone",
    "sphere_channels": 16,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 4,
    "num_radial_basis": 16,
    "cutoff": 5.0,
    "regress_stress": True,
}
DIRECT = {"direct_forces": True, "regress_stress": False}
OURS = "e2former_fairchem.heads.E2FormerV2"
THEIRS = "fairchem.core.models.uma.escn_md."
GRADIENT = {"efs": {"module": OURS + "GradientHead"}}
KERNELS = {"kernel_backend": "triton", "num_layers": 1, "sphere_channels": 8, "head_dim": 2, "num_radial_basis": 4}
LONG_RANGE = {"layers": 1, "lower": 2.0, "upper": 8.0, "envelope": "bell"}


def structures() -> dict[str, list[ase.Atoms]]:
    """Batches: open and periodic systems of several sizes, fewer atoms than workers, atoms without neighbours."""
    crystal = bulk("SiC", "zincblende", a=4.36)
    crystal.rattle(0.05, seed=1)
    slab = ase.Atoms("Cu2O", positions=[[0, 0, 0], [1.8, 1.8, 0.2], [0.3, 1.7, 1.4]], cell=[3.6, 3.6, 15.0])
    slab.pbc = [True, True, False]
    ethanol, ammonia, helium = molecule("CH3CH2OH"), molecule("NH3"), ase.Atoms("He", positions=[[0.1, 0.2, 0.3]])
    apart = ase.Atoms("HeNe", positions=[[0, 0, 0], [30, 0, 0]])
    ammonia.info.update(charge=1, spin=2)
    for atoms in (ethanol, ammonia):
        atoms.rattle(0.05, seed=1)  # equal distances or scores would leave a choice to the rounding
    return {
        "mixed": [ethanol, crystal, slab, ammonia],
        "open": [ethanol, ammonia],
        "chain": [ase.Atoms("CO" * 12, positions=[[1.3 * (7 * i % 24), 0.2 * (i % 3), 0] for i in range(24)])],
        "ammonia": [ammonia],
        "water": [molecule("H2O")],
        "helium": [helium],
        "apart": [apart],
    }


# name: (batch, backbone, heads, options)
CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "auto": ("mixed", {}, GRADIENT, {}),
    "on_the_fly": ("mixed", {"convolution": "on_the_fly"}, GRADIENT, {"train": True}),
    "eaas": ("mixed", {"convolution": "eaas"}, GRADIENT, {"train": True}),
    "dense": ("mixed", {"convolution": "dense", "score": "qk_dot"}, GRADIENT, {}),
    "long range": ("mixed", {"long_range": LONG_RANGE, "score": "qk_dot_scalar"}, GRADIENT, {"train": True}),
    "nearest": ("mixed", {"max_neighbors": 3, "attention_norm": "molfm_v2"}, GRADIENT, {}),
    "checkpointing": ("open", {"activation_checkpointing": True, "divide_charge": True}, GRADIENT, {"train": True}),
    "given edges": ("mixed", {"otf_graph": False}, GRADIENT, {}),
    "float32": ("mixed", {}, GRADIENT, {"dtype": torch.float32}),
    "autocast": ("open", {}, GRADIENT, {"dtype": torch.float32, "autocast": True}),
    "hessian": ("ammonia", {"num_layers": 1}, GRADIENT, {}),
    "one atom": ("helium", {}, GRADIENT, {"train": True}),
    "one atom eaas": ("helium", {"convolution": "eaas"}, GRADIENT, {}),
    "no edges": ("apart", {}, GRADIENT, {}),
    "by space": ("chain", {}, GRADIENT, {"by_space": True}),
    "direct linear": (
        "mixed",
        DIRECT,
        {"energy": {"module": OURS + "EnergyHead"}, "forces": {"module": OURS + "DirectForceHead"}},
        {"train": True},
    ),
    "direct painn": ("one", DIRECT, {"forces": {"module": OURS + "DirectForceHead", "kind": "painn"}}, {}),
    "theirs": ("mixed", {}, {"efs": {"module": THEIRS + "MLP_EFS_Head"}}, {"train": True}),
    "theirs direct": (
        "chain",
        DIRECT,
        {"energy": {"module": THEIRS + "Linear_Energy_Head"}, "forces": {"module": THEIRS + "Linear_Force_Head"}},
        {"by_space": True},
    ),
    "kernels": ("water", KERNELS, GRADIENT, {"dtype": torch.float32}),
}
#: Cases in strict float32.
ROUNDED = ("float32", "kernels")


def batch_of(name: str, dtype: torch.dtype, given_edges: bool, device: str) -> AtomicData:
    """The batch of a case, as fairchem's collater makes it."""
    options = {"r_data_keys": ["spin", "charge"], "task_name": "omol", "target_dtype": dtype}
    found = structures()["helium" if name == "one" else name]
    for atoms in found:
        atoms.info.setdefault("charge", 0)
        atoms.info.setdefault("spin", 1)
    data = atomicdata_list_to_batch([AtomicData.from_ase(atoms, **options) for atoms in found]).to(device)
    if given_edges:
        keys = ("pos", "cell", "pbc", "batch", "natoms")
        graph = build_graph(*(data[key] for key in keys), SMALL["cutoff"])
        data["edge_index"], data["cell_offsets"] = torch.stack([graph.source, graph.target]), graph.offset
    return data


def build(backbone: dict, heads: dict, dtype: torch.dtype, device: str) -> E2FormerV2HydraModel:
    """A small model of a case, the same on every worker."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    options = {"pass_through_head_outputs": True, "supports_single_atoms": True}
    return E2FormerV2HydraModel(backbone=SMALL | backbone, heads=heads, **options).to(device)


def evaluate(case: tuple[str, dict, dict, dict], device: str, exact: bool = False) -> dict[str, torch.Tensor]:
    """Outputs of a case; in training also the gradients of a loss, summed over the workers.

    exact: the same weights and positions in float64, without kernels.
    """
    name, backbone, heads, options = case
    dtype = options.get("dtype", torch.float64)
    model = build(backbone | {"kernel_backend": "reference"} if exact else backbone, heads, dtype, device)
    model.train(options.get("train", False))
    model.backbone.regress_config.hessian = name == "ammonia"
    data = batch_of(name, dtype, not backbone.get("otf_graph", True), device)
    if exact:
        model.double()
        data["pos"], data["cell"] = data["pos"].double(), data["cell"].double()
    with torch.autocast(device, torch.bfloat16, enabled=options.get("autocast", False)):
        output = model(data)
    found = {}
    for key, value in output.items():
        found |= value if isinstance(value, dict) else {key: value}
    found.pop("embeddings", None)
    if options.get("train"):
        generator = torch.Generator().manual_seed(1)
        loss = 0.0
        for value in found.values():
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            loss = loss + (weight * value).sum() + value.square().sum()
        loss.backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                if gp_utils.initialized():
                    dist.all_reduce(parameter.grad)
                found[f"gradient of {key}"] = parameter.grad
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def error_of(function: Callable[[], Any]) -> str:
    """The message of the error that a call ends with."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(rank: int, device: str) -> dict[str, str]:
    """What two workers say to batches and properties that they cannot compute together, one after the other."""
    model = build({}, GRADIENT, torch.float64, device).eval()
    different = batch_of("mixed", torch.float64, False, device)
    different["pos"][0, 0] += rank
    different["charge"][0] += rank
    broken = batch_of("mixed", torch.float64, False, device)
    broken["pos"][1] = float("nan")
    coincident = batch_of("chain", torch.float64, False, device)
    coincident["pos"][1] = coincident["pos"][0]
    return {
        "different": error_of(lambda: model(different)),
        "not finite": error_of(lambda: model(broken)),
        "coincident": error_of(lambda: model(coincident)),
    }


def main(rank: int, store: str, results: str, device: str) -> None:
    """All cases; see the module."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    alone = {name: evaluate(case, device) for name, case in CASES.items()} if rank == 0 else {}
    exact = {name: evaluate(CASES[name], device, exact=True) for name in ROUNDED} if rank == 0 else {}
    backend = "nccl" if device == "cuda" else "gloo"
    # worker 1 waits while worker 0 evaluates everything alone, which on a GPU compiles all kernels
    patience = timedelta(seconds=600 if device == "cuda" else 120)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    gp_utils.setup_graph_parallel_groups(2, backend)
    index = gp_utils.get_gp_config()
    spatial = gp_utils.GraphParallelConfig(2, gp_utils.GPMode.ALL_TO_ALL, gp_utils.GPPartition.SPATIAL)
    together, again = {}, {}
    for name, case in CASES.items():
        gp_utils.set_gp_config(spatial if case[3].get("by_space") else index)
        together[name] = evaluate(case, device)
    gp_utils.set_gp_config(index)
    messages = [None, None]
    dist.all_gather_object(messages, errors(rank, device))
    again = evaluate(CASES["auto"], device)  # after the errors, and a second time
    if rank == 0:
        torch.save({"alone": alone, "exact": exact, "together": together, "again": again, "errors": messages}, results)
    dist.destroy_process_group()
