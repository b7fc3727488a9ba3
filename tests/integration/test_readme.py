"""The Python lines of README and docs run as they stand; those of the tutorial train what they need."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

#: Every page with Python lines, each with the test of them.
PAGES = {
    "README.md": "test_relaxation",
    "docs/md.md": "tests/integration/test_md.py",
    "docs/own_data.md": "tests/integration/test_own_data.py",
    "docs/weights.md": "test_published_weights",
    "docs/workflows.md": "test_the_mixins_exist",
}


@pytest.fixture(scope="module")
def blocks(repo: Path) -> dict[str, str]:
    """The Python lines of each page, one block a page."""
    found = {}
    for page in [repo / "README.md", *(repo / "docs").glob("*.md")]:
        lines = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        if lines:
            (found[page.relative_to(repo).as_posix()],) = lines
    assert sorted(found) == sorted(PAGES)
    return found


def test_relaxation(blocks: dict[str, str], elsewhere: Path) -> None:
    """Methanol with the potential that comes with the package, to its minimum."""
    names: dict = {}
    exec(compile(blocks["README.md"], "README.md", "exec"), names)
    atoms = names["atoms"]
    assert abs(atoms.get_forces()).max() < 0.01
    assert atoms.get_distance(0, 1) == pytest.approx(1.40, abs=0.02)  # Å, C-O


def test_tutorial(launch: Callable, repo: Path, without_figures: None, capsys: pytest.CaptureFixture) -> None:
    """The notebook's cells in their order, with smaller numbers in the first one; none has outputs."""
    cells = [cell for cell in json.loads((repo / "docs" / "tutorial.ipynb").read_text())["cells"] if "outputs" in cell]
    assert not any(cell["outputs"] for cell in cells)
    sizes, *others = ("".join(cell["source"]) for cell in cells)
    sizes, found = re.subn(r"= \d+, \d+, \d+", "= 40, 1, 20", sizes)
    assert found == 1 and len(others) == 5
    names: dict = {}
    for text in (sizes, *others):
        exec(compile(text, "tutorial.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"energy drift -?\d+\.\d{3} meV/atom in 0\.01 ps", out)
    assert re.search(r"forces of frames held out: \d\.\d{3} -> \d\.\d{3} eV/Å", out)
    assert names["result"].checkpoint.is_file() and names["tuned"].checkpoint.is_file()


def test_published_weights(
    blocks: dict[str, str], fixtures_dir: Path, elsewhere: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A released checkpoint is a torch file with the entry ``model``, and its YAML beside it."""
    import torch
    import yaml

    monkeypatch.syspath_prepend(str(repo / "tests" / "model"))
    from molfm_fixtures import load_fixture

    fixture = load_fixture(fixtures_dir / "head_QK_alpha.npz")
    torch.save({"model": fixture.state_dict}, elsewhere / "WEIGHTS.pt")
    (elsewhere / "CONFIG.yaml").write_text(yaml.safe_dump(fixture.config(conserving=True)))
    names: dict = {}
    exec(compile(blocks["docs/weights.md"], "weights.md", "exec"), names)
    assert type(names["model"]).__name__ == "HydraModel"


def test_the_mixins_exist(blocks: dict[str, str]) -> None:
    names: dict = {}
    exec(compile(blocks["docs/workflows.md"], "workflows.md", "exec"), names)
    assert issubclass(names["TestMyPotential"], names["EquivarianceTests"])


def test_the_key_table_is_the_backbone(repo: Path) -> None:
    """Every key of the backbone stands in the table, and no other."""
    import inspect

    from e2former_fairchem.backbone import E2FormerV2Backbone

    section = (repo / "docs" / "configuration.md").read_text().split("## The backbone")[1].split("\nHeads:")[0]
    keys = {k for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE) for k in re.findall(r"`(\w+)`", row)}
    parameters = set(inspect.signature(E2FormerV2Backbone.__init__).parameters)
    assert keys == parameters - {"self", "unknown"}


def test_the_tables_of_the_configuration_are_what_there_is(repo: Path) -> None:
    """Groups with their choices, and commands, by name."""
    from e2former_fairchem.cli import COMMANDS

    page = (repo / "docs" / "configuration.md").read_text()

    def section(title: str) -> str:
        return page.split(f"## {title}\n")[1].split("\n## ")[0]

    assert set(re.findall(r"^\| `([\w-]+)` \|", section("Commands"), re.MULTILINE)) == set(COMMANDS)
    folders = {name: repo / "configs" / name for name in ("dataset", "model", "tasks", "job")}
    folders |= {name: repo / "e2former_fairchem" / "configs" / name for name in ("backbone", "heads")}
    groups = dict(re.findall(r"^\| `(\w+)` \| (`.*?) \|", section("Groups"), re.MULTILINE))
    assert {name: sorted(re.findall(r"\w+", choices)) for name, choices in groups.items()} == {
        name: sorted(file.stem for file in folder.glob("*.yaml")) for name, folder in folders.items()
    }
