"""The README's Python lines run as they stand, on a checkpoint where the quickstart puts its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def blocks(repo: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), flags=re.DOTALL)


def test_molecular_dynamics(
    blocks: list[str],
    write_checkpoint: Callable,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Relaxation and dynamics; 20 steps of each stand for all of them."""
    from ase.optimize import LBFGS

    checkpoint = write_checkpoint(elsewhere / "own.pt")
    target = elsewhere / "runs" / "quickstart" / "inference_ckpt.pt"
    target.parent.mkdir(parents=True)
    shutil.move(checkpoint, target)
    (code,) = [b for b in blocks if "VelocityVerlet" in b]
    shortened = code.replace("run(2000)", "run(20)").replace("steps=200", "steps=20")
    assert shortened != code
    monkeypatch.setattr(LBFGS, "log", lambda self, *args: None)
    exec(compile(shortened, "README.md", "exec"), {})
    assert re.search(r"energy drift -?\d+\.\d{3} meV/atom in 1 ps", capsys.readouterr().out)


def test_published_weights(
    blocks: list[str], fixtures_dir: Path, elsewhere: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A released checkpoint is a torch file with the entry ``model``, and its YAML beside it."""
    import torch
    import yaml

    monkeypatch.syspath_prepend(str(repo / "tests" / "model"))
    from molfm_fixtures import load_fixture

    fixture = load_fixture(fixtures_dir / "head_QK_alpha.npz")
    torch.save({"model": fixture.state_dict}, elsewhere / "WEIGHTS.pt")
    (elsewhere / "CONFIG.yaml").write_text(yaml.safe_dump(fixture.config(conserving=True)))
    (code,) = [b for b in blocks if "build_from_molfm" in b]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["model"]).__name__ == "HydraModel"


def test_the_mixins_of_the_readme_exist(blocks: list[str]) -> None:
    (code,) = [b for b in blocks if "TestMyPotential" in b]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert issubclass(names["TestMyPotential"], names["EquivarianceTests"])


def test_the_key_table_is_the_backbone(repo: Path) -> None:
    """Every key of the backbone stands in the README's table, and no other."""
    import inspect

    from e2former_fairchem.backbone import E2FormerV2Backbone

    section = (repo / "README.md").read_text().split("## The backbone")[1].split("\nHeads:")[0]
    keys = {k for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE) for k in re.findall(r"`(\w+)`", row)}
    parameters = set(inspect.signature(E2FormerV2Backbone.__init__).parameters)
    assert keys == parameters - {"self", "unknown"}
