"""Potentials that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from ase.build import molecule
from ase.io import write
from fairchem.core import FAIRChemCalculator

import e2former_fairchem
from e2former_fairchem import weights
from e2former_fairchem.cli import main
from e2former_fairchem.training.card import describe, read_card, trainings
from e2former_fairchem.training.checkpoint import check_checkpoint_path, read_checkpoint

#: GFN2-xTB's energies, eV (tblite 0.8), of ASE's geometries.
GFN2 = {"H2O": -137.9678, "CH3OH": -223.8355, "C6H6": -432.0834}


@pytest.mark.parametrize("name", weights.names())
def test_a_file_of_averaged_weights_with_a_card(name: str) -> None:
    path = Path(e2former_fairchem.pretrained(name))
    assert path.stat().st_size < 10e6
    content = read_checkpoint(path)
    averaged = {key.removeprefix("module."): value for key, value in content.ema_state_dict.items()}
    assert all(averaged[key].data_ptr() == value.data_ptr() for key, value in content.model_state_dict.items())
    assert {"data", "level_of_theory", "licence", "states", "structures", "steps", "validation", "versions"} <= {
        *content.card
    }


def test_names(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known ones stand for their files wherever a checkpoint is asked for; a file of that name comes first."""
    with pytest.raises(ValueError, match=r"name: expected a potential .*\(gfn2-small\), got 'gfn2'"):
        e2former_fairchem.pretrained("gfn2")
    assert main(["info", "gfn2-small"]) == 0
    said = capsys.readouterr().out
    assert "level of theory: GFN2-xTB" in said and "licence: MIT" in said
    assert str(check_checkpoint_path("gfn2-small")) == e2former_fairchem.pretrained("gfn2-small")
    with pytest.raises(FileNotFoundError, match="expected an inference checkpoint's file or one of gfn2-small, got"):
        check_checkpoint_path("gfn2-large")
    monkeypatch.chdir(tmp_path)
    Path("gfn2-small").write_bytes(b"")
    with pytest.raises(ValueError, match="which is empty"):
        check_checkpoint_path("gfn2-small")


@pytest.mark.parametrize("name", GFN2)
def test_energies_of_gfn2_small(name: str) -> None:
    atoms = molecule(name)
    atoms.info.update(charge=0, spin=1)
    atoms.calc = FAIRChemCalculator.from_model_checkpoint(
        e2former_fairchem.pretrained("gfn2-small"), "omol", device="cpu", inference_settings="traineval"
    )
    assert atoms.get_potential_energy() == pytest.approx(GFN2[name], abs=0.01 * len(atoms))


def test_ensemble_by_name() -> None:
    atoms = molecule("H2O")
    atoms.info.update(charge=0, spin=1)
    atoms.calc = e2former_fairchem.EnsembleCalculator(
        ["gfn2-small", e2former_fairchem.pretrained("gfn2-small")], "omol", device="cpu", inference_settings="traineval"
    )
    assert atoms.get_potential_energy() == pytest.approx(GFN2["H2O"], abs=0.03)
    assert atoms.calc.results["energy_std"] == 0.0


@pytest.mark.usefixtures("nothing_said", "without_figures")
def test_fine_tuning_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Energies of another level of theory, here with other energies per element and per charge."""
    frames = []
    for n in range(8):
        atoms = molecule(("H2O", "CH3OH", "CH4")[n % 3])
        atoms.rattle(0.05, seed=n)
        charge = int(n >= 6)
        energy = GFN2["H2O"] if n % 3 == 0 else -60.0
        atoms.info.update(charge=charge, spin=1 + charge, REF_energy=energy * len(atoms))
        atoms.arrays["REF_forces"] = atoms.positions * 0.0 + 0.1
        frames.append(atoms)
    write(tmp_path / "mine.xyz", frames)
    result = e2former_fairchem.train(
        tmp_path / "mine.xyz",
        output=tmp_path / "run",
        from_checkpoint="gfn2-small",
        overrides=["epochs=1", "card.level_of_theory=wB97M-V"],
    )
    content = read_checkpoint(result.checkpoint)
    assert read_card(content)["started_from"] == "gfn2-small"
    *_, before = read_card(content)["trained_before"]
    assert (before["name"], before["level_of_theory"], before["licence"]) == ("gfn2-small", "GFN2-xTB", "MIT")
    lines = dict(line.strip().split(": ", 1) for line in describe(content))
    assert (lines["elements"], lines["level of theory"]) == ("H, C, O", "wB97M-V")
    assert lines["charges and multiplicities"] == "+0 and 1, +1 and 2"
    assert lines["trained before"].startswith("gfn2-small, GFN2-xTB, ")
    assert "Br" in lines["with elements"] and "+3 and 1" in lines["with charges and multiplicities"]
    assert lines["elements of earlier trainings only"].startswith("B, N, F, Si, P, S, Cl, Br, I; forces rest")
    # Chlorine keeps gfn2-small's energy, and says so.
    chloride = molecule("CH3Cl")
    chloride.info.update(charge=0, spin=1)
    chloride.calc = FAIRChemCalculator.from_model_checkpoint(
        str(result.checkpoint), task_name="omol", device="cpu", inference_settings="traineval"
    )
    assert chloride.get_potential_energy() < -100.0
    assert "only an earlier training saw Cl:" in caplog.text
    # Tuned once more: both trainings are on the card.
    again = trainings(content, "mine")
    assert [one["name"] for one in again[-2:]] == ["gfn2-small", "mine"] and again[-1]["elements"] == ["H", "C", "O"]
