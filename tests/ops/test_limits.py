"""Limits that keep the tree readable: sizes of the kernels' package, long functions, patched names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "e2former_kernels"
OURS = (KERNELS, ROOT / "e2former_fairchem")
#: Of the kernels' package; a file's lines; a function's, unless its docstring says why ("Long: ..."); in all tests.
FILES, LINES, FILE_LINES, FUNCTION_LINES, PATCHES = 59, 10_000, 600, 80, 40


def test_size_of_the_kernels_package() -> None:
    lines = {path.relative_to(KERNELS): len(path.read_text().splitlines()) for path in KERNELS.rglob("*.py")}
    assert 40 < len(lines) <= FILES, len(lines)
    assert sum(lines.values()) <= LINES, sum(lines.values())
    assert {path: number for path, number in lines.items() if number > FILE_LINES} == {}


def without_reason(source: str) -> list[str]:
    """Names of functions that are long and do not say why."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    long = [f for f in functions if f.end_lineno - f.lineno + 1 > FUNCTION_LINES]
    return [f.name for f in long if "Long: " not in (ast.get_docstring(f) or "")]


def test_long_functions_say_why() -> None:
    found = {str(path): without_reason(path.read_text()) for root in OURS for path in root.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}
    body = "    pass\n" * FUNCTION_LINES
    assert without_reason(f"def f():\n{body}") == ["f"]
    assert without_reason(f'def f():\n    """Long: a reason."""\n{body}') == []


def test_few_names_are_patched() -> None:
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert len(tests) > 50
    assert sum(path.read_text().count("monkeypatch.setattr") for path in tests) <= PATCHES


def test_kernels_on_float16_rows_are_named_in_one_place() -> None:
    """Whoever wants rows in another format finds all kernels in the docstring of ``common/half.py``."""
    told = set(
        re.findall(r"``(\w+/kernels\w*\.py)``", ast.get_docstring(ast.parse((KERNELS / "common/half.py").read_text())))
    )
    marks = re.compile(r"\bHALF: tl\.constexpr|def half_\w+_kernel")
    found = {path for path in KERNELS.rglob("*.py") if marks.search(path.read_text())}
    assert {str(path.relative_to(KERNELS)) for path in found} == told


def test_float16_is_named_in_one_place() -> None:
    """Another format of rows is a change of ``common/half.py``, and of when they are taken."""
    home = {KERNELS / "common/half.py", ROOT / "e2former_fairchem/execution.py"}
    named = re.compile(r"\b(torch|tl)\.float16\b|\.half\(\)")
    found = {path for root in OURS for path in root.rglob("*.py") if named.search(path.read_text())}
    assert KERNELS / "common/half.py" in found
    assert found <= home, found - home


def test_the_norms_stand_in_one_file() -> None:
    """Which attention norms there are, ``attention_norm.py`` alone says: nobody else compares with a norm's name."""
    from e2former_kernels.equivariant_attention.attention_norm import NORMS

    home = KERNELS / "equivariant_attention/attention_norm.py"
    for path in KERNELS.rglob("*.py"):
        compared = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare))
        names = {c.value for node in compared for c in ast.walk(node) if isinstance(c, ast.Constant)} & set(NORMS)
        assert path == home or not names, (path, names)
    assert {norm.name for norm in NORMS.values()} == set(NORMS)
