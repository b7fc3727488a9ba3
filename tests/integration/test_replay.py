"""Training steps that are padded, and on a GPU replayed from CUDA graphs, are fairchem's steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ase import Atoms
from ase.build import bulk, molecule
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.modules.loss import DDPMTLoss, L2NormLoss, MAELoss, PerAtomMAELoss
from fairchem.core.modules.normalization.element_references import ElementReferences
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task
from omegaconf import OmegaConf
from torch import Tensor

from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.training.recorders import LossRecorder
from e2former_fairchem.training.replay import Replays, padded_sizes, why_eager
from e2former_fairchem.training.schedule import warmup_cosine
from e2former_fairchem.training.unit import TrainEvalUnit

GRADIENT = {"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead", "prefix": "omol"}}
DIRECT = {
    "energy": {"module": "e2former_fairchem.heads.E2FormerV2EnergyHead", "prefix": "omol"},
    "forces": {"module": "e2former_fairchem.heads.E2FormerV2DirectForceHead", "prefix": "omol"},
}
KINDS = {"conserving": (GRADIENT, False), "direct": (DIRECT, True)}


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    """fairchem's unit wraps the model for data-parallel training, also of one worker."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses_of(kind: str) -> list[Task]:
    """The tasks of our configs, with references of a made-up size."""
    energy, forces = DDPMTLoss(PerAtomMAELoss(), coefficient=10.0), DDPMTLoss(L2NormLoss(), coefficient=10.0)
    if kind == "l2mae":
        energy, forces = DDPMTLoss(MAELoss(), coefficient=20.0), PerSystemSumLoss(L2NormLoss(), coefficient=2.0)
    references = ElementReferences(torch.linspace(-3, 3, 100, dtype=torch.float64))
    common = {"normalizer": Normalizer(mean=0.0, rmsd=1.5), "datasets": ["omol"]}
    return [
        Task("omol_energy", "system", "energy", OutputSpec([1], "float32"), loss_fn=energy,
             element_references=references, **common),
        Task("omol_forces", "atom", "forces", OutputSpec([3], "float32"), loss_fn=forces, **common),
    ]  # fmt: skip


def unit_of(build: Callable, kind: str, losses: str = "atoml2mae", **options: Any) -> TrainEvalUnit:
    """A unit that trains a small network from the same weights every time."""
    heads, direct = KINDS[kind]
    model = build(copy.deepcopy(heads), torch.float32, direct_forces=direct)
    unit = TrainEvalUnit(
        job_config=OmegaConf.create({"debug": True, "logger": None}),
        model=model,
        optimizer_fn=partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-2),
        cosine_lr_scheduler_fn=partial(warmup_cosine, warmup_steps=2, steps=20),
        tasks=losses_of(losses),
        clip_grad_norm=100,
        ema_decay=0.9,
        **options,
    )
    unit.load_scheduler(10)
    unit.previous_wall_time = 0.0
    unit.model.train()
    return unit


def labelled(batch_of: Callable, *structures: Atoms, seed: int = 0) -> AtomicData:
    """A batch with labels that are made up, as fairchem's collater hands it over."""
    batch = batch_of(*structures, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    batch.omol_energy = torch.randn(len(structures), generator=generator)
    batch.omol_forces = torch.randn(batch.pos.shape[0], 3, generator=generator)
    batch.dataset_name = ["omol"] * len(structures)
    return batch


@pytest.fixture
def batches(batch_of: Callable) -> Callable[[], list[AtomicData]]:
    """Molecules of several sizes, an ion, an atom without neighbours, a crystal, fixed atoms, labels to leave out."""
    ion = molecule("CH3CH2O")
    ion.info.update(charge=-1, spin=1)
    crystal = bulk("SiC", "zincblende", a=4.36)
    crystal.rattle(0.05, seed=1)
    sets = [
        [molecule("H2O"), molecule("C6H6"), ion],
        [molecule("CH4"), crystal, Atoms("He"), molecule("NH3")],
        [molecule("C6H6")] * 2,
        [molecule("H2O"), molecule("CH3CH2OH"), ion],
    ]
    for atoms in (atoms for frames in sets for atoms in frames):
        atoms.info = {"charge": 0, "spin": 1} | atoms.info

    def make() -> list[AtomicData]:
        made = [labelled(batch_of, *frames, seed=n) for n, frames in enumerate(sets)]
        made[0].fixed[2] = 1
        made[2].omol_forces[4] = torch.inf
        made[3].omol_energy[1] = torch.inf
        return made

    return make


def gradients(unit: TrainEvalUnit) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in unit.model.module.named_parameters() if p.grad is not None}


def step(unit: TrainEvalUnit, batch: AtomicData) -> float:
    state = SimpleNamespace(train_state=SimpleNamespace(dataloader=range(10)))
    unit.train_step(state, batch)
    unit.train_progress.increment_step()
    return float(unit.last_loss)


@pytest.mark.parametrize("losses", ["atoml2mae", "l2mae"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_padded_batches(build: Callable, batches: Callable, kind: str, losses: str) -> None:
    eager, padded = (unit_of(build, kind, losses, clip_grad_norm=None) for _ in range(2))
    for unit in (eager, padded):
        unit.optimizer.step = lambda: None
        unit.optimizer.zero_grad = lambda set_to_none=True: None if set_to_none is True else None
    replays = Replays(padded, padded.model.module, 4, capture=False)
    recorders = LossRecorder(eager), None
    for batch, same in zip(batches(), batches(), strict=True):
        eager.model.zero_grad()
        recorders[0].reset()
        recorders[0].start_step()
        step(eager, batch)
        found = replays(same)
        for name, loss in recorders[0].losses.items():
            torch.testing.assert_close(found[name].double(), loss.double(), rtol=1e-5, atol=0.0)
        expected, got = gradients(eager), gradients(padded)
        assert expected.keys() == got.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
