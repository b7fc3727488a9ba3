"""Training steps that are padded, and on a GPU replayed from CUDA graphs, are fairchem's steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
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
from torch import Tensor, nn

from e2former_fairchem.graph import Graph
from e2former_fairchem.training import replay
from e2former_fairchem.training.losses import PerSystemSumLoss
from e2former_fairchem.training.padding import PaddedBatch, PaddingCollater, padded_sizes
from e2former_fairchem.training.recorders import LossRecorder
from e2former_fairchem.training.replay import Captures, Replays, Update, why_eager, why_no_graphs
from e2former_fairchem.training.schedule import warmup_cosine
from e2former_fairchem.training.unit import TrainEvalUnit
from e2former_kernels.common.chunks import EdgeList, SeveralChunks

GRADIENT = {"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead", "prefix": "omol"}}
DIRECT = {
    "energy": {"module": "e2former_fairchem.heads.E2FormerV2EnergyHead", "prefix": "omol"},
    "forces": {"module": "e2former_fairchem.heads.E2FormerV2DirectForceHead", "prefix": "omol"},
}
KINDS = {"conserving": (GRADIENT, False), "stress": (GRADIENT, False), "direct": (DIRECT, True)}


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    """fairchem's unit wraps the model for data-parallel training, also of one worker."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses_of(kind: str, stress: bool = False) -> list[Task]:
    """The tasks of our configs, with references of a made-up size."""
    energy, forces = DDPMTLoss(PerAtomMAELoss(), coefficient=10.0), DDPMTLoss(L2NormLoss(), coefficient=10.0)
    if kind == "l2mae":
        energy, forces = DDPMTLoss(MAELoss(), coefficient=20.0), PerSystemSumLoss(L2NormLoss(), coefficient=2.0)
    references = ElementReferences(torch.linspace(-3, 3, 100, dtype=torch.float64))
    common = {"normalizer": Normalizer(mean=0.0, rmsd=1.5), "datasets": ["omol"]}
    tasks = [
        Task(
            "omol_energy",
            "system",
            "energy",
            OutputSpec([1], "float32"),
            loss_fn=energy,
            element_references=references,
            **common,
        ),
        Task("omol_forces", "atom", "forces", OutputSpec([3], "float32"), loss_fn=forces, **common),
    ]
    if stress:
        loss = DDPMTLoss(MAELoss(), coefficient=5.0)
        tasks.append(Task("omol_stress", "system", "stress", OutputSpec([1, 9], "float32"), loss_fn=loss, **common))
    return tasks


def unit_of(build: Callable, kind: str = "conserving", losses: str = "atoml2mae", lr: float = 1e-3, **options: Any):
    """A unit that trains a small network from the same weights every time, eagerly."""
    heads, direct = KINDS[kind]
    dtype = options.pop("dtype", torch.float64)
    regress = {"direct_forces": direct, "regress_stress": kind == "stress"}
    model = build(copy.deepcopy(heads), dtype, **regress, **options.pop("backbone", {}))
    unit = TrainEvalUnit(
        job_config=OmegaConf.create({"debug": True, "logger": None}),
        model=model,
        optimizer_fn=partial(torch.optim.AdamW, lr=lr, weight_decay=1e-2),
        cosine_lr_scheduler_fn=partial(warmup_cosine, warmup_steps=2, steps=20),
        tasks=losses_of(losses, kind == "stress"),
        clip_grad_norm=100,
        ema_decay=0.9,
        **options,
    )
    unit.load_scheduler(10)
    unit.previous_wall_time = 0.0
    unit.model.train()
    return unit


def padded(unit: TrainEvalUnit, capture: bool = False) -> TrainEvalUnit:
    """The same with padded steps."""
    unit._replays = Replays(unit, unit.model.module, 8, Captures() if capture else None)
    unit._update = Update(unit, capture)
    return unit


@pytest.fixture
def batches(batch_of: Callable) -> Callable[..., list[AtomicData]]:
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

    def make(dtype: torch.dtype = torch.float64) -> list[AtomicData]:
        made = []
        for n, frames in enumerate(sets):
            generator = torch.Generator().manual_seed(n)
            batch = batch_of(*frames, dtype=dtype)
            batch.omol_energy = torch.randn(len(frames), dtype=dtype, generator=generator)
            batch.omol_forces = torch.randn(batch.pos.shape, dtype=dtype, generator=generator)
            batch.omol_stress = torch.randn(len(frames), 9, dtype=dtype, generator=generator)
            batch.dataset_name = ["omol"] * len(frames)
            made.append(batch)
        made[0].fixed[2] = 1
        made[2].omol_forces[4] = torch.inf
        made[3].omol_energy[1] = torch.inf
        return made

    return make


def train(unit: TrainEvalUnit, batches: list[AtomicData], steps: int | None = None) -> list[dict[str, Tensor]]:
    """Take steps; returns the gradients of each, and its losses as the callbacks get them."""
    found: list[dict[str, Tensor]] = []
    recorder, steps_of = LossRecorder(unit), (unit, "_update") if unit._replays else (unit.optimizer, "step")
    plain = getattr(*steps_of)
    collate = PaddingCollater(lambda batch: batch, unit.model.module.backbone, unit.tasks)

    def step() -> None:
        plain()
        named = unit.model.module.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    step._wrapped_by_lr_sched = True  # what torch's schedules look for
    setattr(*steps_of, step)
    state = SimpleNamespace(train_state=SimpleNamespace(dataloader=range(10)))
    for batch in batches[:steps]:
        atoms = int(batch.natoms.sum())
        recorder.reset()
        recorder.start_step()
        unit.train_step(state, collate(batch) if unit._replays else batch)
        recorder.end_step()
        unit.train_progress.increment_step()
        assert (recorder.structures, int(recorder.atoms)) == (batch.natoms.numel(), atoms)
        found[-1] |= {f"loss {task}": loss.clone() for task, loss in recorder.losses.items()}
        found[-1]["loss"] = torch.as_tensor(unit.last_loss)
        found[-1]["gradient norm"] = torch.as_tensor(unit.last_grad_norm).clone()
    setattr(*steps_of, plain)
    recorder.detach()
    return found


def state_of(unit: TrainEvalUnit) -> dict[str, Tensor]:
    """Weights and their average."""
    return {
        f"{kind}.{name}": value.clone()
        for kind, model in (("weights", unit.model), ("average", unit.ema_model))
        for name, value in model.state_dict().items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("losses", ["atoml2mae", "l2mae"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_padded_batches(build: Callable, batches: Callable, kind: str, losses: str) -> None:
    """fairchem's own step beside, from the same weights; the padding shows in the last digits of float64 only."""
    eager, ours = (
        train(unit, batches())
        for unit in (unit_of(build, kind, losses, lr=0.0), padded(unit_of(build, kind, losses, lr=0.0)))
    )
    for expected, found in zip(eager, ours, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            exactly = {"rtol": 1e-6 if "loss" in name else 1e-9, "atol": 1e-11 * max(1.0, float(value.abs().max()))}
            torch.testing.assert_close(found[name].double(), value.double(), msg=name, **exactly)


def train_on_a_rank(file: Path) -> dict[str, list[dict[str, Tensor]]]:
    """By kind of losses what `train` finds, with the model and the batches in a file."""
    found = {}
    for losses in ("atoml2mae", "l2mae"):
        model, batches = torch.load(file, weights_only=False)
        unit = padded(unit_of(lambda *_, model=model, **__: model, losses=losses, lr=0.0))
        assert unit._replays.workers == 2
        found[losses] = train(unit, batches)
    return found


def test_two_workers(
    build: Callable, batches: Callable, on_two_ranks: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers with the same batches: losses and gradients of one worker."""
    monkeypatch.setenv(distutils.CURRENT_DEVICE_TYPE_STR, "cpu")  # as theirs
    model = build(GRADIENT, direct_forces=False, regress_stress=False)
    torch.save((model, batches()), tmp_path / "given.pt")
    for rank in on_two_ranks(train_on_a_rank, tmp_path / "given.pt"):
        for losses, ours in rank.items():
            one = train(padded(unit_of(build, losses=losses, lr=0.0)), batches())
            for expected, found in zip(one, ours, strict=True):
                assert expected.keys() == found.keys()
                for name, value in expected.items():
                    torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def lone_atom(batch_of: Callable) -> AtomicData:
    """A batch without edges."""
    batch = batch_of(Atoms("He", info={"charge": 0, "spin": 1}))
    batch.omol_energy, batch.omol_forces = torch.ones(1).double(), torch.zeros(1, 3).double()
    batch.dataset_name = ["omol"]
    return batch


def test_training_with_padded_batches(build: Callable, batches: Callable, batch_of: Callable) -> None:
    """The same weights and average after several steps, the same bits in two runs, and in one that was resumed.

    One batch among them has no edges.
    """

    def several() -> list[AtomicData]:
        return [*batches()[:1], lone_atom(batch_of), *batches()[1:]]

    eager, ours, again, resumed = (unit_of(build) for _ in range(4))
    for unit in (ours, again, resumed):
        padded(unit)
    for unit in (eager, ours, again):
        train(unit, several())
    train(resumed, several(), 3)
    kept = copy.deepcopy(resumed.state_dict())
    resumed = padded(unit_of(build))
    resumed.load_state_dict(kept)
    train(resumed, several()[3:])
    expected, found = state_of(eager), state_of(ours)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert not same(expected, state_of(unit_of(build))), "the weights have moved"
    assert same(found, state_of(again)) and same(found, state_of(resumed))
    assert ours.states_seen == eager.states_seen == {(0, 1), (-1, 1)}


def test_sizes_are_few_and_close() -> None:
    sizes = [padded_sizes(atoms, edges, 10) for atoms in range(60, 4000, 7) for edges in (20 * atoms, 50 * atoms)]
    wanted = [(atoms, edges) for atoms in range(60, 4000, 7) for edges in (20 * atoms, 50 * atoms)]
    for (atoms, edges), size in zip(wanted, sizes, strict=True):
        assert atoms < size.atoms <= 1.25 * atoms and edges <= size.edges <= 1.1 * edges and size.systems > 10
        assert size.edges - edges <= 2.1 * max(edges / atoms, 16) * (size.atoms - atoms)
    assert len({size.edges for size in sizes}) < 70


class Recomputed:
    """A capture without a GPU: its replay computes again from the fixed memory, into the same losses."""

    def __init__(self, batch: PaddedBatch, device: torch.device, compute: Callable) -> None:
        self.memory = torch.zeros_like(batch.memory)
        self.given = batch.tensors(self.memory)
        self.losses = {
            key: torch.full_like(loss, torch.nan) for key, loss in compute(batch.tensors(batch.memory)).items()
        }
        self.compute, self.graph = compute, self

    def replay(self) -> None:
        for key, loss in self.compute(self.given).items():
            self.losses[key].copy_(loss)


def test_captured_sizes(build: Callable, batches: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """A size is captured when it comes up a third time, its memory holds all of a batch, and few sizes are kept."""
    room = True

    def capture(*given: Any) -> Recomputed:
        if not room:
            raise RuntimeError("no room")
        return Recomputed(*given)

    ours, again = padded(unit_of(build, "direct")), unit_of(build, "direct")
    again._replays, again._update = Replays(again, again.model.module, 2, capture), Update(again, capture=False)
    found, captured = ([train(unit, batches()) for _ in range(4)] for unit in (ours, again))
    sizes = list(again._replays._graphs)
    assert len(again._replays._steps) >= 3 and len(sizes) == 2, "the least recently used is gone"
    assert set(again._replays._steps.values()) == {replay.STEPS_BEFORE}
    assert "more than 2 sizes (max_graphs)" in caplog.text
    assert all(same(a, b) for one, other in zip(found, captured, strict=True) for a, b in zip(one, other, strict=True))

    room = False
    again._replays._graphs.clear()
    before = state_of(again)
    train(again, batches())
    assert again._replays.refused == "no room" and caplog.text.count("capturing a training step failed") == 3
    assert not same(before, state_of(again)), "the steps were taken"


def test_edges_of_several_runs(build: Callable, batches: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Up to twice the edges of a run are one run; with more the step is taken without a graph, and said once a size."""
    number = torch.arange(100)
    edges = {"source": number, "target": number, "row_ptr": torch.arange(101), "species": number}
    (whole,) = EdgeList(**edges, one_chunk=2).chunks_of(50)
    assert whole.num_edges == 100 and len(EdgeList(**edges).chunks_of(50)) == 2
    with pytest.raises(SeveralChunks, match="100 edges, 49 in a chunk"):
        EdgeList(**edges, one_chunk=2).chunks_of(49)
    expected = train(padded(unit_of(build)), batches())
    unit = padded(unit_of(build))

    def refuse(network: nn.Module, given: tuple) -> None:
        if any(isinstance(graph, Graph) and graph.one_chunk for graph in given):
            raise SeveralChunks("many edges")

    unit.model.module.backbone.model.register_forward_pre_hook(refuse)
    found = train(unit, [*batches(), *batches()])
    assert all(same(a, b) for a, b in zip(expected, found, strict=False))
    assert caplog.text.count("their edges take several chunks (many edges)") == len({*unit._replays._steps})


def test_what_is_not_replayed_says_why(build: Callable, caplog: pytest.LogCaptureFixture) -> None:
    reasons = {
        "activation_checkpointing is true": {"backbone": {"activation_checkpointing": True}},
        "convolution is eaas": {"backbone": {"convolution": "eaas"}},
        "debug_checksums_save_path is given": {},
    }
    for reason, options in reasons.items():
        unit = unit_of(build, **options)
        if "debug" in reason:
            unit.debug_checksums_save_path = "somewhere"
        assert why_eager(unit, unit.model.module) == reason
    unit = unit_of(build, replay="auto")
    assert why_eager(unit, unit.model.module) is None
    head = next(iter(unit.model.module.output_heads.values()))
    head.capturable = False  # as that of a head which does not say otherwise
    assert why_eager(unit, unit.model.module) == f"there is a {type(head).__name__}"
    head.capturable = True
    unit.tasks[1].loss_fn.reduction = "per_structure"
    assert why_eager(unit, unit.model.module) == "the loss of omol_forces is DDPMTLoss (L2NormLoss, per_structure)"
    assert why_no_graphs(unit.model.module) == "training runs on cpu"
    state = SimpleNamespace(train_state=SimpleNamespace(dataloader=range(10)))
    with caplog.at_level(logging.INFO):
        unit.on_train_start(state)
    assert "training steps: eager (the loss of omol_forces is" in caplog.text and unit._replays is None
    with pytest.raises(ValueError, match="replay: expected auto or off, got 'on'"):
        unit_of(build, replay="on")


PRECISIONS = {"strict": {}, "tf32": {"tf32": True}, "bf16": {"bf16": True}}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "strict") for kind in KINDS), ("conserving", "tf32"), ("conserving", "bf16")]
)
def test_replays_are_padded_steps(build: Callable, batches: Callable, kind: str, precision: str) -> None:
    """Captured or not, the same bits; against fairchem's own steps within float32's rounding; memory stays flat."""

    def many() -> list[AtomicData]:
        return [batch for _ in range(8) for batch in batches(torch.float32)]

    options = {"kind": kind, "dtype": torch.float32} | PRECISIONS[precision]
    eager, ours, again = unit_of(build, **options), unit_of(build, **options), unit_of(build, **options)
    padded(ours)
    padded(again, capture=True)
    expected = train(eager, many())
    losses, captured = train(ours, many()), train(again, many())
    assert len(again._replays._graphs) == len({*again._replays._steps}) >= 3
    assert again._replays.refused is again._update.refused is None
    assert again._update._graph is not None and ours._update._graph is None
    different = [
        (step, name, float((a[name] - b[name]).abs().max()))
        for step, (a, b) in enumerate(zip(losses, captured, strict=True))
        for name in a
        if not torch.equal(a[name], b[name])
    ]
    first = [name for step, name, _ in different if step == different[0][0]]
    equal = [name for name in losses[different[0][0]] if name not in first] if different else []
    assert not different, (
        f"{len(different)} in steps {sorted({step for step, *_ in different})}: {different[:3]}; "
        f"equal in the first: {equal}"
    )
    assert same(state_of(ours), state_of(again))
    rtol = {"strict": 1e-5, "tf32": 2e-3, "bf16": 2e-2}[precision]
    for a, b in zip(expected, captured[:4], strict=False):
        torch.testing.assert_close(b["loss"].double(), a["loss"].double(), rtol=rtol, atol=0.0)
    collate = PaddingCollater(lambda batch: batch, again.model.module.backbone, again.tasks)
    collated = [collate(batch).pin_memory() for batch in batches(torch.float32)]
    state = SimpleNamespace(train_state=SimpleNamespace(dataloader=range(10)))
    again.print_every = 10**9
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")  # no step waits for the GPU
    try:
        for step in range(1000):
            again.train_step(state, collated[step % len(collated)])
            again.train_progress.increment_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_run_going(build: Callable, batches: Callable) -> None:
    unit, eager = (unit_of(build, dtype=torch.float32) for _ in range(2))
    padded(unit, capture=True)

    def refuse(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("no")

    unit.model.module.backbone.model.register_forward_pre_hook(refuse)
    many = [batch for _ in range(5) for batch in batches(torch.float32)]
    train(unit, many)
    train(eager, [batch for _ in range(5) for batch in batches(torch.float32)])
    assert unit._replays.refused == "no"
    expected = state_of(eager)
    for name, value in state_of(unit).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
