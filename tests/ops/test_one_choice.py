"""How an evaluation runs is decided in `e2former_fairchem/execution.py` alone: nothing below it asks.

Nobody else at all asks for a backend's name, or whether Triton runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHOICE = ROOT / "e2former_fairchem/execution.py"
QUESTIONS = {
    "get_float32_matmul_precision",
    "is_autocast_enabled",
    "get_autocast_dtype",
    "is_compiling",
    "is_current_stream_capturing",
    "backends",
    "requires_grad",
}
#: Questions about the backend, asked nowhere else; so are comparisons with its names.
BACKEND = {"kernel_backend", "triton_problem", "interpreting"}
NAMES = {"reference", "triton"}
#: What a file may ask all the same, and why that decides nothing about how an evaluation runs.
ALLOWED = {
    ("kernels/e2former_kernels/common/call.py", "requires_grad"): "of a tensor: autograd keeps no other",
    ("kernels/e2former_kernels/common/chunks.py", "requires_grad"): "of what a recomputation made",
    ("kernels/e2former_kernels/common/call.py", "is_autocast_enabled"): "to switch it off, without a context's time",
    ("e2former_fairchem/captured.py", "requires_grad"): "of the edge vectors: is there a gradient to capture",
    ("e2former_fairchem/graph.py", "requires_grad"): "of the cell",
    ("e2former_fairchem/model.py", "requires_grad"): "freeze() remembers what unfreeze() gives back",
    ("kernels/e2former_kernels/common/backend.py", "interpreting"): "the answer",
    ("kernels/e2former_kernels/common/backend.py", "triton"): "the package's name",
    ("kernels/e2former_kernels/common/checks.py", "triton_problem"): "an operation that cannot run says so",
    ("e2former_fairchem/config.py", "kernel_backend"): "the key, checked",
    ("e2former_fairchem/commands/doctor.py", "triton_problem"): "reported",
    ("e2former_fairchem/commands/doctor.py", "triton"): "a package",
}


def sources() -> list[Path]:
    """All of ours but the choice."""
    folders = (ROOT / "kernels/e2former_kernels", ROOT / "e2former_fairchem")
    found = [p for folder in folders for p in folder.rglob("*.py") if p != CHOICE]
    assert len(found) > 150
    return found


def below(path: Path) -> bool:
    """Whether a source runs below the choice: the kernels, the network's modules, the trunk and what it uses."""
    package = ROOT / "e2former_fairchem"
    trunk = ("model", "captured", "frozen", "graph", "segments", "spatial_order")
    folders = (ROOT / "kernels/e2former_kernels", package / "nn", package / "so3")
    return any(path.is_relative_to(f) for f in folders) or path in {package / f"{name}.py" for name in trunk}


def questions(source: str) -> Iterator[str]:
    """Names of :data:`QUESTIONS` and :data:`BACKEND` that a source reads, and of backends that it compares with."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in QUESTIONS | BACKEND:
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if node.attr != "backends" or owner == "torch":
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from BACKEND & {node.id}
        elif isinstance(node, ast.ImportFrom):
            yield from (name.name for name in node.names if name.name in QUESTIONS)
        elif isinstance(node, ast.Compare):
            constants = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant))
            yield from (c for c in constants if isinstance(c, str) and c in NAMES)


def test_nobody_asks() -> None:
    found = {
        (str(p.relative_to(ROOT)), name)
        for p in sources()
        for name in questions(p.read_text())
        if below(p) or name in BACKEND | NAMES
    }
    assert found - set(ALLOWED) == set(), "asked outside of e2former_fairchem/execution.py"
    assert set(ALLOWED) - found == set(), "allowed, and asked no more"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trained = weight.requires_grad", ["requires_grad"]),
        ("fast = torch.backends.cuda.matmul.allow_tf32", ["backends"]),
        ("from torch.compiler import is_compiling", ["is_compiling"]),
        ("x = torch.get_float32_matmul_precision()", ["get_float32_matmul_precision"]),
        ("x = f(x) if config.kernel_backend == 'triton' else x", ["kernel_backend", "triton"]),
        ("if name in ('auto', 'reference'): pass", ["reference"]),
        ("fused = triton_problem(x.device) is None", ["triton_problem"]),
        ("weight.requires_grad_(False); torch.set_float32_matmul_precision('high')", []),
        ("run('reference', kernel_backend='triton')", []),
    ],
)
def test_questions_are_seen(source: str, expected: list[str]) -> None:
    assert sorted(questions(source)) == expected
