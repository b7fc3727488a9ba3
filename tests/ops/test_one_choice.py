"""How an evaluation runs is decided in `e2former_fairchem/execution.py` alone: nothing below it asks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = {
    "get_float32_matmul_precision",
    "is_autocast_enabled",
    "get_autocast_dtype",
    "is_compiling",
    "is_current_stream_capturing",
    "backends",
    "requires_grad",
}
#: What a file may ask all the same, and why that decides nothing about how an evaluation runs.
ALLOWED = {
    ("kernels/e2former_kernels/common/step.py", "requires_grad"): "of an input: autograd keeps no other",
    (
        "kernels/e2former_kernels/common/runs.py",
        "requires_grad",
    ): "of what a recomputation made",
    ("kernels/e2former_kernels/common/step.py", "is_autocast_enabled"): "to switch it off, without a context's time",
    (
        "e2former_fairchem/captured.py",
        "requires_grad",
    ): "of the edge vectors: is there a gradient to capture",
    ("e2former_fairchem/graph.py", "requires_grad"): "of the cell",
    ("e2former_fairchem/model.py", "requires_grad"): "freeze() remembers what unfreeze() gives back",
}


def below() -> list[Path]:
    """Sources that run below the choice: the kernels, the network's modules, the trunk and what it uses."""
    package = ROOT / "e2former_fairchem"
    trunk = ("model", "captured", "frozen", "graph", "segments", "spatial_order")
    folders = (ROOT / "kernels/e2former_kernels", package / "nn", package / "so3")
    found = [p for folder in folders for p in folder.rglob("*.py")] + [package / f"{name}.py" for name in trunk]
    assert len(found) > 50 and all(p.exists() for p in found)
    return found


def questions(source: str) -> Iterator[str]:
    """Names of :data:`QUESTIONS` that a source reads, as attributes or imported; ``backends`` is torch's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in QUESTIONS:
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if node.attr != "backends" or owner == "torch":
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (name.name for name in node.names if name.name in QUESTIONS)


def test_nobody_asks() -> None:
    found = {(str(p.relative_to(ROOT)), name) for p in below() for name in questions(p.read_text())}
    assert found - set(ALLOWED) == set(), "asked below e2former_fairchem/execution.py"
    assert set(ALLOWED) - found == set(), "allowed, and asked no more"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trained = weight.requires_grad", ["requires_grad"]),
        ("fast = torch.backends.cuda.matmul.allow_tf32", ["backends"]),
        ("from torch.compiler import is_compiling", ["is_compiling"]),
        ("x = torch.get_float32_matmul_precision()", ["get_float32_matmul_precision"]),
        ("weight.requires_grad_(False); torch.set_float32_matmul_precision('high')", []),
    ],
)
def test_questions_are_seen(source: str, expected: list[str]) -> None:
    assert list(questions(source)) == expected
