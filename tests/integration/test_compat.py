"""Private names of fairchem and torch: all in two modules, each there, each as it was when it was last looked at."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fairchem.core.datasets.ase_datasets import AseDBDataset
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from e2former_fairchem import cli, compat
from e2former_fairchem.leaderboard.s2ef import S2EFRunner
from e2former_kernels import compat as kernels

NAMES = [*compat.PRIVATE_NAMES, *kernels.PRIVATE_NAMES]
ALLOWED = {
    **dict.fromkeys(("_asdict", "_fields", "_replace"), "documented, of named tuples"),
    "_version": "how often a tensor was changed in place, in torch's documentation of autograd",
    "_modules": "torch.nn.Module's children, without their names",
    "_parameters": "torch.nn.Module's own parameters, without their names",
    "_predictor": "an example cleans up after fairchem-lammps as that does itself",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path)
def test_a_private_name_is_there_as_it_was(name: kernels.PrivateName) -> None:
    found = name.get()  # its error says what breaks
    if name.parameters is not None:
        given = tuple(inspect.signature(found).parameters)
        assert given == name.parameters, f"{name.path} takes {given} now; it may break {name.breaks}"


@pytest.mark.parametrize("path", ["torch:_C._gone", "torch._gone:at_all", "torch:Tensor._gone.further"])
def test_a_name_that_is_gone_is_told_with_what_breaks(path: str) -> None:
    with pytest.raises(ImportError, match=rf"{path} is gone .* without which the tests breaks: a reason"):
        kernels.PrivateName(path, "a reason", "the tests").get()


def private_uses(file: Path) -> Iterator[str]:
    """Private modules and names of other packages that a file imports, and private attributes that it reads."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.attr
        modules = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] not in ("__future__", "e2former_fairchem", "e2former_kernels"):
                yield from (part for part in parts if part.startswith("_"))


def own_private_names(file: Path) -> Iterator[str]:
    """Private names that a file defines: functions, classes, fields, variables and attributes of `self`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_no_other_file_uses_private_names(repo: Path) -> None:
    """Of what nobody here has defined: reading or importing it is the compat modules' work alone."""
    roots = ("e2former_fairchem", "kernels/e2former_kernels", "hydra_plugins", "examples")
    files = [file for root in roots for file in (repo / root).rglob("*.py") if file.name != "compat.py"]
    assert len(files) > 100
    own = {name for file in files for name in own_private_names(file)} | set(ALLOWED)
    strangers = {str(file.relative_to(repo)): found for file in files if (found := {*private_uses(file)} - own)}
    assert not strangers, f"private names outside of compat.py: {strangers}"


def test_doctor_tells_what_is_installed(capsys, tmp_path: Path, monkeypatch) -> None:
    assert cli.main(["doctor", "--molecules", "1"]) == 0
    assert f"the tests ran with {compat.TESTED_FAIRCHEM}" in capsys.readouterr().out
    (tmp_path / "fairchem_core-2.26.0.dist-info").mkdir()
    (tmp_path / "fairchem_core-2.26.0.dist-info" / "METADATA").write_text("Name: fairchem-core\nVersion: 2.26.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "fairchem.core.modules.loss", None)  # as of a version that has it elsewhere
    assert cli.main(["doctor", "--molecules", "1"]) == 1
    out = capsys.readouterr().out
    assert "fairchem-core 2.26.0: UNTESTED (the tests ran with 2.24)" in out
    assert "fairchem.core.modules.loss:DDPMTLoss._ddp_mean is gone: breaks the authors' force loss" in out
    assert "2 private names are gone" in out


def test_workers_of_a_loader_end_when_told() -> None:
    loader = DataLoader(range(4), num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for _ in range(2):
        assert [int(n) for n in loader] == [0, 1, 2, 3]
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        kernels.end_workers(loader)
        assert not any(worker.is_alive() for worker in workers)
    kernels.end_workers(DataLoader(range(4)))


def test_versions_are_bounded_to_what_is_tested(repo: Path) -> None:
    assert f'"fairchem-core>={compat.TESTED_FAIRCHEM},<2.25"' in (repo / "pyproject.toml").read_text()
    assert compat.fairchem_state()["is_tested"], "the tests' fairchem is another than compat.TESTED_FAIRCHEM"
    assert torch.__version__.startswith(kernels.TESTED_TORCH), "compat.TESTED_TORCH lacks the tests' torch"


def test_sizes_of_a_leaderboard_run(repo: Path, tmp_path: Path) -> None:
    """From fairchem's public metadata, from the rows where there is none; a foreign file is refused."""
    sample = repo / "e2former_fairchem" / "data" / "sample" / "val_known"

    def sizes(folder: Path) -> list[int]:
        runner = object.__new__(S2EFRunner)  # without a checkpoint, which sizes do not need
        runner.dataset, runner.data, runner._sizes = AseDBDataset(DictConfig({"src": str(folder)})), str(folder), None
        return runner.sizes().tolist()

    expected = np.load(sample / "metadata.npz")["natoms"].tolist()
    assert sizes(sample) == expected
    shutil.copy(sample / "data.aselmdb", tmp_path)
    assert sizes(tmp_path) == expected
    np.savez(tmp_path / "metadata.npz", natoms=np.arange(3))
    with pytest.raises(ValueError, match="the metadata.npz of the rows of .*3 and dataset size 60"):
        sizes(tmp_path)
