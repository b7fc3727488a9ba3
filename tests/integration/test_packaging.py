"""A wheel and an editable install, each in a virtual environment of its own and used from another folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

PLACES = """
import importlib.metadata, importlib.util, json
found = {name: importlib.util.find_spec(name).origin for name in ("e2former_fairchem", "e2former_kernels")}
found["plugin"] = importlib.util.find_spec("hydra_plugins.e2former_fairchem_plugin").origin
print(json.dumps(found | {"version": importlib.metadata.version("e2former-fairchem")}))
"""
COMPOSED = """
import json, sys
from pathlib import Path
from fairchem.core._cli import get_hydra_config_from_yaml
from fairchem.core.common.registry import registry
host, data = sys.argv[1:]
config = get_hydra_config_from_yaml(host, [
    data, "backbone=e2former_v2_omol25", "+heads=e2former_v2_direct_by_task",
    "~moe_layer_type", "~num_moe_experts", "~otf_graph", "~direct_forces", "~dataset_list"])
model = config.runner.train_eval_unit.model
assert registry.get_model_class("e2former_v2").__name__ == "E2FormerV2Backbone"
from e2former_fairchem.launch import find
from e2former_fairchem.training import resolvers
print(json.dumps({
    "backbone": model.backbone.model, "heads": sorted(model.heads),
    "sample": str(Path(resolvers.sample("train")) / "data.aselmdb"),
    "references": len(resolvers.element_references("omol25")),
    "run": get_hydra_config_from_yaml(str(find("baselines/escn_md_quickstart")), []).job.run_name,
}))
"""


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # what is installed
    words = [str(c) for c in command]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", folder, root, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install(kind: str, request: pytest.FixtureRequest, repo: Path, tmp_path: Path, fake_omol25: tuple) -> None:
    """Dependencies come from this environment by a .pth file, which does not carry over an editable install of ours.

    What a wheel lacks shows when it is used; an editable install is this checkout, which all other tests use.
    """
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    target = ["-e", repo] if kind == "editable" else [request.getfixturevalue("wheel")]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--force-reinstall"]
    run(*pip, "--no-deps", "--no-build-isolation", *target, cwd=tmp_path)

    command = run(environment / "bin" / "e2former-fairchem", "--version", cwd=tmp_path)
    assert command.startswith("e2former-fairchem ")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    places = json.loads(run(python, "-c", PLACES, cwd=elsewhere))
    assert places.pop("version") == tomllib.loads((repo / "pyproject.toml").read_text())["project"]["version"]
    if kind == "wheel":
        data = f"cluster.data_root_dir={Path(fake_omol25[0].split('=')[1]).parent}"
        host = Path(__file__).parent / "host" / "uma_sm_direct.yaml"
        found = json.loads(run(python, "-c", COMPOSED, host, data, cwd=elsewhere).splitlines()[-1])
        places["sample"] = found["sample"]
        assert found["backbone"] == "e2former_fairchem.backbone.E2FormerV2Backbone"
        assert found["heads"] == ["omol_energy", "omol_forces"]
        assert found["references"] == 119
        assert found["run"] == "escn_md_quickstart"  # its groups lie in another folder
    for file in map(Path, places.values()):
        assert file.is_relative_to(repo if kind == "editable" else site) and file.is_file(), places
    assert list(elsewhere.iterdir()) == []


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {
        "e2former_fairchem",
        "e2former_fairchem_cli.py",
        "e2former_fairchem_openmm.py",
        "e2former_kernels",
        "hydra_plugins",
    }
    assert "hydra_plugins/__init__.py" not in names  # a namespace that other plugins share
    for needed in (
        "e2former_fairchem/configs/own_data.yaml",
        "e2former_fairchem/run_files/leaderboard/s2ef.yaml",
        "e2former_fairchem/configs/backbone/e2former_v2_omol25.yaml",
        "e2former_fairchem/configs/heads/e2former_v2_conserving.yaml",
        "e2former_fairchem/data/sample/val_new/data.aselmdb",
        "e2former_fairchem/data/sample/val_new/metadata.npz",
        "e2former_fairchem/data/element_references/omol25.json",
        "e2former_fairchem/data/element_references/tzvpd.json",
        "e2former_fairchem/report/page.html",
        "e2former_fairchem/weights/gfn2-small.pt",
    ):
        assert needed in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert wheel.stat().st_size < 15e6
    weights = sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.endswith(".pt"))
    assert wheel.stat().st_size - weights < 3 * 2**20


def test_source_archive_holds_what_a_wheel_is_built_of(repo: Path, tmp_path: Path) -> None:
    """And the run files a second time, where a clone has a link."""
    from hatchling.builders.sdist import SdistBuilder

    (archive,) = SdistBuilder(str(repo)).build(directory=str(tmp_path))
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    packages = ("e2former_fairchem", "hydra_plugins", "kernels/e2former_kernels")
    needed = {p.relative_to(repo).as_posix() for name in packages for p in (repo / name).rglob("*.[pyj]*")}
    needed = {name for name in needed if "__pycache__" not in name}
    assert "e2former_fairchem/run_files/train/omol25_direct.yaml" in needed
    assert needed <= names
    assert "configs/train/omol25_direct.yaml" in names and "e2former_fairchem_cli.py" in names


def test_sources_are_clean() -> None:
    """ruff, with the import bans of each folder."""
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels/e2former_kernels", "import fairchem"),
        ("kernels/e2former_kernels", "import e3nn"),
        ("kernels/e2former_kernels", "import e2former_fairchem"),
        ("e2former_fairchem/so3", "import fairchem.core"),
        ("e2former_fairchem/nn", "from e2former_fairchem.backbone import E2FormerV2Backbone"),
        ("e2former_fairchem", "import fairchem"),
    ],
)
def test_import_bans_hold_inside_functions(folder: str, line: str) -> None:
    """What a folder must not import, not even late; the file is never written, ruff is told where it would be."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251"]
    result = subprocess.run(
        [*command, "--stdin-filename", str(root / folder / "intruder.py"), "-"],
        input=f"def late():\n    {line}\n",
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert result.returncode == 1
    assert "TID251" in result.stdout


def test_python_versions_are_those_that_are_tested(repo: Path) -> None:
    """In the classifiers, on the installation's page and in the README."""
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (repo / "pyproject.toml").read_text())
    assert classifiers == ["3.11", "3.12"]
    install = (repo / "docs" / "install.md").read_text().split("```")[0]
    assert re.findall(r"\b3\.\d+", install) == classifiers
    assert f"Python {' or '.join(classifiers)};" in (repo / "README.md").read_text()
