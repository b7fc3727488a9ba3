"""`fairchem -c configs/evaluate/pes.yaml` as a whole: reports, own structures, foreign models, errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase.io import write

from e2former_fairchem.heads import E2FormerV2GradientHead
from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.run import CHECKS
from e2former_fairchem.pes.settings import build_settings
from e2former_fairchem.pes.systems import load_systems
from e2former_fairchem.runners.pes import ChecksFailed, PESRunner

#: Every check, at the smallest size that still means something.
SHORT = (
    "nve.steps=30",
    "nve.relax_steps=2",
    "bond_scan.systems=[N2]",
    "bond_scan.points=61",
    "forces.components=4",
    "forces.systems=[H2O,ammonia_crystal]",
    "extensivity.systems=[H2O]",
    "extensivity.copies=[2,3]",
    "cutoff.systems=[H2O]",
    "cutoff.step=0.02",
    "cutoff.max_tail_force=null",
    "job.device_type=CPU",
)


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pes") / "small.pt", cutoff=4.0, reflection_equivariant=True)


@pytest.fixture(scope="module")
def config(repo: Path) -> Path:
    return repo / "configs" / "evaluate" / "pes.yaml"


def test_a_whole_run(launch: Callable, config: Path, checkpoint: Path, elsewhere: Path, capsys) -> None:
    """A smooth, conserving, reflection-equivariant network passes all that its random weights and its normaliser allow.

    The test checkpoints' energies are 2 x + 0.5 eV: not extensive, by 0.5 eV (1 - 1/n).
    """
    pytest.importorskip("matplotlib")
    launch(config, f"checkpoint={checkpoint}", *SHORT, "nve.max_drift=1e6", "bond_scan.max_extra_extrema=null")
    folder = elsewhere / "runs" / "pes"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["pes.json", "pes.md", "pes.png"]
    report = json.loads((folder / "pes.json").read_text())
    assert report["verdicts"] == {**dict.fromkeys(CHECKS, "pass"), "extensivity": "fail"}
    two, more, force = report["checks"]["extensivity"]["H2O"]["metrics"]
    assert two["value"] == pytest.approx(250) and more["value"] == pytest.approx(1000 / 3)
    assert force["verdict"] == "pass"
    assert report["checkpoint"]["precision"] == "float64" and report["checkpoint"]["cutoff"] == 4.0
    assert report["settings"]["nve"]["steps"] == 30 and len(report["checkpoint"]["sha256"]) == 64
    assert len(report["checks"]["nve"]["CH3OH"]["curves"]["energy"]) == 31
    assert (folder / "pes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    assert (
        "pes 8/8" in out and "5 of 6 checks pass; fail: extensivity" in out and f"results: {folder / 'pes.json'}" in out
    )
    assert "| drift of the total energy " in out and "standard error" not in out
    assert "standard error" in (folder / "pes.md").read_text()


def test_a_truncating_model_with_direct_forces(
    launch: Callable, config: Path, write_checkpoint: Callable, elsewhere: Path, capsys
) -> None:
    heads = {
        "energy": {"module": "e2former_fairchem.heads.E2FormerV2EnergyHead"},
        "forces": {"module": "e2former_fairchem.heads.E2FormerV2DirectForceHead"},
    }
    path = write_checkpoint(elsewhere / "direct.pt", heads=heads, cutoff=4.0, max_neighbors=8, direct_forces=True)
    overrides = ("checks=[forces,reflection,cutoff]", "cutoff.systems=[ammonia_crystal]", "plot=false")
    launch(config, f"checkpoint={path}", *(s for s in SHORT if "cutoff.systems" not in s), *overrides)
    report = json.loads((elsewhere / "runs" / "pes" / "pes.json").read_text())
    assert report["verdicts"] == dict.fromkeys(("forces", "reflection", "cutoff"), "fail")
    jump = report["checks"]["cutoff"]["ammonia_crystal"]["metrics"][0]
    assert jump["name"] == "energy jump, at most" and jump["verdict"] == "fail"
    out = capsys.readouterr().out
    assert "direct forces: they are no gradient of the energy" in out
    assert "expected: the checkpoint's network was built with reflection_equivariant: false" in out
    assert not (elsewhere / "runs" / "pes" / "pes.png").exists()


def test_own_structures_in_single_precision(
    launch: Callable, config: Path, checkpoint: Path, elsewhere: Path, capsys
) -> None:
    """An exception inside one check is shown, the other check is done, and the run ends with an error."""
    (_, ion), _ = load_systems(["OH", "N2"], "x")
    ion.info.update(charge=-1, spin=1)
    write(elsewhere / "ion.xyz", ion)
    overrides = ("checks=[extensivity,forces]", "extensivity.gap=1.0", "precision=float32", "plot=false")
    with pytest.raises(ChecksFailed, match=r"extensivity \(error\); see .*pes\.md"):
        launch(config, f"checkpoint={checkpoint}", *SHORT, *overrides, f"structures={elsewhere / 'ion.xyz'}")
    report = json.loads((elsewhere / "runs" / "pes" / "pes.json").read_text())
    assert report["checkpoint"]["precision"] == "float32"
    assert list(report["checks"]["forces"]) == ["ion"]
    assert report["checks"]["forces"]["ion"]["verdict"] in ("pass", "unresolved")
    assert (
        "extensivity.gap: expected more than the cutoff 4.0 Å, got 1.0"
        in report["checks"]["extensivity"]["ion"]["error"]
    )
    assert "extensivity.gap" in capsys.readouterr().out


def test_the_yaml_says_the_defaults(config: Path, checkpoint: Path) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    settings = get_hydra_config_from_yaml(str(config), [f"checkpoint={checkpoint}"]).runner.settings
    for name, (kind, _) in CHECKS.items():
        assert build_settings(kind, name, settings[name]) == kind(), name
        assert set(settings[name]) == {field.name for field in dataclasses.fields(kind)}


def test_errors_come_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"epoch": 1}, tmp_path / "foreign.pt")  # which no model can be loaded from
    common = {"checkpoint": str(tmp_path / "foreign.pt"), "output_dir": str(tmp_path / "out")}
    for changed, error, message in (
        ({"checkpoint": str(tmp_path / "absent.pt")}, FileNotFoundError, "checkpoint: expected .* does not exist"),
        ({"checkpoint": None}, ValueError, "checkpoint: expected an inference checkpoint .*, got nothing"),
        ({"checks": ["nve", "phlogiston"]}, ValueError, "checks: expected some of nve, .*, got phlogiston"),
        ({"checks": []}, ValueError, "checks: expected some of .*, got none"),
        ({"settings": {"nev": {}}}, ValueError, "settings: expected some of nve, .*, got nev"),
        ({"precision": "half"}, ValueError, "precision: expected one of auto, float64, float32, got 'half'"),
        ({"raise_on": "full moon"}, ValueError, "raise_on: expected one of error, fail, never"),
        ({"inference": "slow"}, ValueError, "inference: expected a preset's name"),
        ({"max_atoms": 0}, ValueError, "max_atoms: expected a positive integer, got 0"),
        ({"seed": -1}, ValueError, "seed: expected an integer that is not negative, got -1"),
    ):
        with pytest.raises(error, match=message):
            PESRunner(**common | changed)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    with pytest.raises(ModuleNotFoundError, match=r"plot: expected matplotlib .*pip install matplotlib.*or plot=false"):
        PESRunner(**common)
    PESRunner(**common, plot=False)
    assert not (tmp_path / "out").exists()


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"epoch": 1}, path)
    with pytest.raises(ValueError, match="expected a fairchem inference checkpoint, got .* with the keys epoch"):
        Potential.load(str(path), "omol", "batch", "auto", "cpu", 64)


class SinglePrecisionHead(E2FormerV2GradientHead):
    """Computes in float32 alone."""

    def forward(self, data, emb):
        if emb["node_embedding"].dtype == torch.float64:
            raise RuntimeError("kernels take float32")
        return super().forward(data, emb)


def test_single_precision_where_double_does_not_run(write_checkpoint: Callable, tmp_path: Path) -> None:
    heads = {"efs": {"module": f"{__name__}.SinglePrecisionHead"}}
    checkpoint = write_checkpoint(tmp_path / "single.pt", heads=heads)
    found = Potential.load(str(checkpoint), "omol", "batch", "auto", "cpu", 64)
    assert found.precision == "float32" and "RuntimeError: kernels take float32" in found.note
    assert found.evaluate([load_systems(["H2O"], "x")[0][1]])[1][0].shape == (3, 3)
    with pytest.raises(RuntimeError, match="kernels take float32"):
        Potential.load(str(checkpoint), "omol", "batch", "float64", "cpu", 64).evaluate(
            [load_systems(["H2O"], "x")[0][1]]
        )
