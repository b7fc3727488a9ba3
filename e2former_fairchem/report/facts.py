"""What a report says about its run: network, data, time, machine, versions, configuration."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

import torch
from fairchem.core.common import distutils
from omegaconf import OmegaConf
from torchtnt.framework.state import State
from torchtnt.framework.unit import TEvalUnit

from e2former_fairchem.leaderboard.provenance import environment
from e2former_fairchem.report.errors import SetErrors
from e2former_fairchem.report.text import duration


def _commit() -> str | None:
    """Commit of this package where it runs from a checkout; a `+` tells of changes that are not committed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "") if head.returncode == 0 else None


def _checkpoint(config: Path) -> str | None:
    """The checkpoint that an evaluation of ours reads."""
    if not config.is_file():
        return None
    return OmegaConf.select(OmegaConf.load(config), "runner.eval_unit.model.checkpoint_location")


def _network(model: torch.nn.Module) -> str | None:
    """Class of the backbone inside fairchem's wrappers."""
    backbone = next((module.backbone for module in model.modules() if hasattr(module, "backbone")), None)
    return None if backbone is None else type(backbone).__name__


def _counted(errors: SetErrors, dataset: Any) -> str:
    """How many structures of a set the errors count."""
    size = dict(zip(dataset.dataset_names, map(len, dataset.datasets), strict=True))[errors.name]
    text = f"{errors.name}: {errors.structures:,} structures"
    if errors.structures > size:
        text += f" ({size:,}, and those that fill the last batches of several ranks)"
    elif errors.structures < size:
        text += f" of {size:,}"
    return text


def gather_facts(state: State, unit: TEvalUnit, seconds: float | None, sets: list[SetErrors]) -> dict[str, Any]:
    """Facts on a run that just ended, ready for JSON; without names of hosts and users.

    Args:
        state: torchtnt's state.
        unit: fairchem's training or evaluation unit.
        seconds: of training, over all resumed parts, or of the evaluation.
        sets: the errors.
    """
    job = unit.job_config
    training = state.train_state is not None
    device = torch.device(distutils.get_device_for_local_rank()).type
    machine = environment(device)
    ranks = distutils.get_world_size()
    parameters = sum(p.numel() for p in unit.model.parameters())
    rows: list[list[str]] = [["network", f"{_network(unit.model) or 'unknown'}, {parameters:,} parameters"]]
    if training:
        progress = unit.train_progress
        loader = state.train_state.dataloader
        rows += [
            ["training data", f"{len(loader.dataset):,} structures"],
            [
                "training",
                f"{progress.num_steps_completed:,} steps, {progress.num_epochs_completed:,} epochs of {len(loader):,}",
            ],
        ]
        if unit.ema_model is not None:
            rows.append(["errors of", "the averaged (EMA) weights at the end"])
    rows.append(["validation data", "; ".join(_counted(s, state.eval_state.dataloader.dataset) for s in sets)])
    config = Path(job.metadata.config_path)
    if not training and (checkpoint := _checkpoint(config)):
        rows.insert(1, ["checkpoint", checkpoint])
    if seconds is not None:
        rows.append(["time", duration(seconds) + (", evaluations included" if training else "")])
    rows.append(
        ["devices", f"{ranks} × {machine['device']}" + (f", CUDA {machine['cuda']}" if machine["cuda"] else "")]
    )
    if device == "cuda":
        rows.append(["peak memory of rank 0", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"])
    rows.append(["seed", str(job.seed)])
    versions = {k: v for k, v in machine["packages"].items() if v is not None} | {"python": machine["python"]}
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in versions.items())])
    if commit := _commit():
        rows.append(["commit", commit])
    rows.append(["folder", str(config.parent)])
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    kind = "training" if training else "evaluation"
    final = {"step": unit.train_progress.num_steps_completed, "seconds": seconds} if training else None
    return {
        "kind": kind,
        "final": final,
        "title": f"{job.run_name}: {kind} report",
        "subtitle": f"{_network(unit.model) or 'Network'} with {parameters:,} parameters · {written}",
        "footer": f"Written by e2former-fairchem {versions.get('e2former-fairchem', '')} on {written}.",
        "facts": rows,
        "config": config.read_text() if config.is_file() else None,
    }
