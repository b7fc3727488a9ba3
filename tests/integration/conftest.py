"""Small models, structures and checkpoints for the tests of the plugin inside fairchem."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import ase
import pytest
import torch
from ase.build import bulk, molecule

sys.path.insert(0, str(Path(__file__).parent))
import ranks

BACKBONE = "e2former_fairchem.backbone.E2FormerV2Backbone"
SMALL = {
    "sphere_channels": 16,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 4,
    "num_radial_basis": 16,
    "cutoff": 5.0,
}


@pytest.fixture(scope="session")
def structures() -> dict[str, ase.Atoms]:
    """Molecules, an atom, a crystal with a cell smaller than the cutoff and a slab, with charge and spin."""
    crystal = bulk("SiC", "zincblende", a=4.36)
    crystal.rattle(0.05, seed=1)
    slab = ase.Atoms("Cu2O", positions=[[0, 0, 0], [1.8, 1.8, 0.2], [0.3, 1.7, 1.4]], cell=[3.6, 3.6, 15.0])
    slab.pbc = [True, True, False]
    found = {
        "ethanol": molecule("CH3CH2OH"),
        "water": molecule("H2O"),
        "ammonia": molecule("NH3"),
        "atom": ase.Atoms("He"),
        "crystal": crystal,
        "slab": slab,
    }
    for name, atoms in found.items():
        atoms.info.update(charge=1, spin=2) if name == "ammonia" else atoms.info.update(charge=0, spin=1)
    return found


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Any]:
    """Batch of ASE structures as fairchem's collater and calculator make them."""

    def make(*structures: ase.Atoms, dtype: torch.dtype = torch.float64, task: str = "omol", **options: Any):
        from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

        keys = {"r_data_keys": ["spin", "charge"], "task_name": task, "target_dtype": dtype} | options
        return atomicdata_list_to_batch([AtomicData.from_ase(atoms, **keys) for atoms in structures])

    return make


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """HydraModel of a small backbone and a head (a path or a name), in float64 unless told otherwise."""

    def make(
        head: str | dict = "e2former_fairchem.heads.E2FormerV2GradientHead",
        dtype: torch.dtype = torch.float64,
        **backbone: Any,
    ):
        from e2former_fairchem.hydra_model import E2FormerV2HydraModel

        heads = head if isinstance(head, dict) else {"head": {"module": head}}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        try:
            model = E2FormerV2HydraModel(
                backbone={"model": BACKBONE, **SMALL, **backbone},
                heads=heads,
                pass_through_head_outputs=True,
                supports_single_atoms=True,
            )
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    return make


@pytest.fixture
def on_two_ranks(forks: BaseContext, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list]:
    """`on_two_ranks(function, *arguments)`: what a function of the test's module returns on each of two ranks."""

    def run(function: Callable, *arguments: Any) -> list:
        folder = tmp_path_factory.mktemp("ranks")
        given = folder, inspect.getfile(function), function.__name__, arguments
        with ProcessPoolExecutor(2, forks) as pool:
            for rank in [pool.submit(ranks.main, rank, *given) for rank in range(2)]:
                rank.result()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

    return run


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once in a process has not been said yet."""
    from e2former_fairchem import validation

    monkeypatch.setattr(validation, "_logged", set())


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have all but their figures, which take seconds."""
    monkeypatch.setattr("e2former_fairchem.report.page.draw", lambda sets, records: {})


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Inference checkpoint of a random small model, in the format that fairchem's trainer writes."""

    def write(path: Path, heads: dict | None = None, forces: bool = True, **backbone: Any) -> Path:
        import hydra
        from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
        from omegaconf import OmegaConf

        config = {
            "_target_": "e2former_fairchem.hydra_model.E2FormerV2HydraModel",
            "backbone": {"model": BACKBONE, **SMALL, **backbone},
            "heads": heads or {"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead"}},
            "pass_through_head_outputs": True,
            "supports_single_atoms": True,
        }
        torch.manual_seed(0)
        weights = hydra.utils.instantiate(config).state_dict()
        tasks = [_task("energy", "system", [1])] + ([_task("forces", "atom", [3])] if forces else [])
        checkpoint = MLIPInferenceCheckpoint(
            model_config=OmegaConf.create(config),
            model_state_dict=weights,
            ema_state_dict={"n_averaged": torch.tensor(1), **{f"module.{k}": v for k, v in weights.items()}},
            tasks_config=[OmegaConf.create(task) for task in tasks],
        )
        torch.save(checkpoint, path)
        return path

    return write


@pytest.fixture(scope="session")
def d3_table(tmp_path_factory) -> Path:
    """A table in which every pair has C6 = 6.5 atomic units, r2r4 = 2 and no dependence on the surroundings."""
    table = {"rcov": torch.ones(95), "r4r2": torch.full((95,), 2.0)}
    table |= {"c6ab": torch.zeros(95, 95, 5, 5), "cn_ref": torch.full((95, 95, 5, 5), -1.0)}
    table["c6ab"][1:, 1:, 0, 0], table["cn_ref"][1:, :, 0] = 6.5, 0.0
    path = tmp_path_factory.mktemp("d3") / "table.pt"
    torch.save(table, path)
    return path


def _task(name: str, level: str, dim: list[int]) -> dict[str, Any]:
    unit = "fairchem.core.units.mlip_unit.mlip_unit"
    return {
        "_target_": f"{unit}.Task",
        "name": name,
        "level": level,
        "property": name,
        "out_spec": {"_target_": f"{unit}.OutputSpec", "dim": dim, "dtype": "float32"},
        "normalizer": {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": 0.5 if name == "energy" else 0.0,
            "rmsd": 2.0,
        },
        "datasets": ["omol"],
    }
