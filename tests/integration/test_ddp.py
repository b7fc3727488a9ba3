"""Training and evaluation by two workers of this machine, through fairchem's launcher: what one worker does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

# The sampler hands a rank every second structure of the epoch's order, so two ranks with half the batch take the steps
# of one rank. Plain gradient descent: Adam divides a gradient by its own size, which blows rounding up.
SETTINGS = (
    "dataset=folders",
    "element_references=spice",  # zero, as suits labels that are made up
    "epochs=2",
    "evaluate_every=1",
    "lr=0.02",
    "warmup_steps=1",
    "runner.train_eval_unit.optimizer_fn._target_=torch.optim.SGD",
    "runner.train_eval_unit.ema_decay=0.5",
    "runner.callbacks.1.every_n_steps=1",
)
TWO = ("job.scheduler.ranks_per_node=2",)
# Its figures take seconds; that of two data-parallel ranks is in test_configs.py.
NO_REPORT = "runner.callbacks.3._target_=torchtnt.framework.callback.Callback"
KINDS = {
    "data": (*TWO, "batch_size=4", "num_workers=1", NO_REPORT),
    "graph": (*TWO, "+job.graph_parallel.group_size=2"),
}


def outcome(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Lines of metrics.jsonl, and the weights of the inference checkpoint (of the last step, not the average)."""
    (lines,) = folder.rglob("metrics.jsonl")
    checkpoint = torch.load(folder / "inference_ckpt.pt", weights_only=False)
    return [json.loads(line) for line in lines.read_text().splitlines()], checkpoint.model_state_dict


@pytest.mark.slow
def test_two_workers_train_as_one(
    repo: Path, launch: Callable, tiny: Sequence[str], fake_omol25: Sequence[str], elsewhere: Path
) -> None:
    """Losses and gradient norms of every step, errors of every evaluation and the weights at the end.

    A parameter without a gradient would stop fairchem's DistributedDataParallel at the second step.
    """
    common = (*tiny, *SETTINGS, *fake_omol25, "batch_size=8")
    check(lambda *overrides: launch(repo / "configs" / "quickstart.yaml", *common, *overrides), elsewhere)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(
    repo: Path, fairchem_process: Callable, tiny: Sequence[str], fake_omol25: Sequence[str], elsewhere: Path
) -> None:
    """By hand, on a machine with two GPUs: `pytest -m gpu tests/integration/test_ddp.py`."""
    common = (*tiny, *SETTINGS, *fake_omol25, "batch_size=8", "job.device_type=CUDA")
    check(lambda *overrides: fairchem_process(repo / "configs" / "quickstart.yaml", *common, *overrides), elsewhere)


def check(run: Callable[..., None], folder: Path) -> None:
    """Train with one worker and with two, data parallel and graph parallel, and compare."""
    run("job.run_dir=one", NO_REPORT)
    one, expected = outcome(folder / "one")
    assert [line["kind"] for line in one].count("train") == 6
    errors = [line["metrics"]["omol.val"]["omol_energy,per_atom_mae"] for line in one if line["kind"] == "evaluation"]
    assert abs(errors[-1] / errors[0] - 1) > 0.004  # the weights have moved
    for kind, overrides in KINDS.items():
        run(f"job.run_dir={kind}", *overrides)
        two, weights = outcome(folder / kind)
        assert [(line["kind"], line["step"]) for line in two] == [(line["kind"], line["step"]) for line in one]
        for first, second in zip(one, two, strict=True):
            assert numbers(second) == pytest.approx(numbers(first), rel=2e-4), (kind, first["step"])
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(weights[key], value, rtol=1e-3, atol=1e-5), (kind, key)


def numbers(line: dict) -> dict[str, float]:
    """What a line of metrics.jsonl says apart from times."""
    return (
        {key: line[key] for key in ("loss", "grad_norm", "lr")}
        if line["kind"] == "train"
        else line["metrics"]["omol.val"]
    )
