"""A test module's function on one of two ranks; run by the fixture `on_two_ranks`, a process each."""

from __future__ import annotations

import os
import runpy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from fairchem.core.common import distutils


def main(rank: int, folder: Path, file: str, function: str, arguments: tuple) -> None:
    """Write what ``function`` of the module ``file`` returns to ``folder``, once both ranks have joined a group."""
    torch.set_num_threads(1)
    os.environ[distutils.CURRENT_DEVICE_TYPE_STR] = "cpu"
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    try:
        torch.save(runpy.run_path(file)[function](*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
