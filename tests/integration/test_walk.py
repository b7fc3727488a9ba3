"""How far a reader walks: files that energy and forces of one layer go through, and how often they change file.

Kernels are called and not interpreted: their launches are counted, and do nothing. What is made once for a process, as
constants of launches, is there from an evaluation before.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase.build import molecule

from e2former_kernels.common.backend import triton_installed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
FILES, CHANGES = 45, 150
OURS = ("e2former_fairchem", "kernels/e2former_kernels")
PARTS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")  # of a function; no calls in every version of Python


def walk(function: Callable[[], object], repo: Path) -> list[str]:
    """Our file of every call, in their order."""
    folders, files = tuple(f"{repo / folder}/" for folder in OURS), []

    def note(frame, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folders) and code.co_name not in PARTS:
            files.append(code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return files


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, which do not run."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *given, **options: names.append(kernel.fn.__name__))
    return names


def test_energy_and_forces_of_one_layer(build, batch_of, launches: list[str], repo: Path) -> None:
    model = build(dtype=torch.float32, num_layers=1, kernel_backend="triton")
    first, second = (batch_of(molecule("H2O", info={"charge": 0, "spin": 1}), dtype=torch.float32) for _ in range(2))
    model(first)
    launches.clear()
    files = walk(lambda: model(second), repo)
    assert model.backbone.model.execution == "kernels"
    assert {"harmonics_kernel", "attend_kernel", "attend_backward_kernel", "sender_kernel"} <= set(launches)
    changes = sum(a != b for a, b in itertools.pairwise(files))
    assert len(set(files)) <= FILES and changes <= CHANGES, f"{len(set(files))} files, {changes} changes of file"
    assert changes > CHANGES // 2, "the walk was not seen"
