"""Phonons and elastic constants through fairchem's runners on a small crystal; the numbers are checked another way."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import FIRE

pytest.importorskip("pymatgen")

from e2former_fairchem.runners.crystals import (
    CrystalsFailed,
    ElasticConstantsRunner,
    PhononRunner,
    load_calculator,
    load_crystals,
)

needs_phonopy = pytest.mark.skipif(importlib.util.find_spec("phonopy") is None, reason="phonopy not installed")


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("crystals") / "small.pt", cutoff=4.0, num_layers=1)


@pytest.fixture(scope="module")
def relaxed(checkpoint: Path) -> Atoms:
    """Diamond in the test model's own lattice, with its calculator."""
    atoms = bulk("C", "diamond", a=3.57)
    atoms.info.update(charge=0, spin=1)
    atoms.calc = load_calculator(str(checkpoint), "omol", "batch", "float64")
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=500)
    return atoms


def table(folder: Path, pattern: str) -> dict:
    """What fairchem's runner wrote of the only crystal."""
    (file,) = folder.rglob(pattern)
    with gzip.open(file, "rt") as handle:
        return {key: column["0"] for key, column in json.load(handle).items()}


@needs_phonopy
def test_phonons(launch: Callable, repo: Path, checkpoint: Path, relaxed: Atoms, elsewhere: Path, capsys) -> None:
    """With one cell as its supercell, phonopy knows the zone's centre alone: three zeros and the optical mode.

    Its frequency follows from the force on one of the two sublattices after a shift of it: w^2 = -2 dF/du / m.
    """
    config = repo / "configs" / "evaluate" / "phonons.yaml"
    launch(config, f"checkpoint={checkpoint}", "supercell=[1,1,1]", "job.device_type=CPU")
    folder = elsewhere / "runs" / "phonons"
    found = table(folder, "mdr_phonon_dist*.json.gz")
    assert found["sid"] == "diamond" and found["errors"] == ""
    assert found["volume_per_atom"] == pytest.approx(relaxed.get_volume() / 2, rel=2e-3)

    force = []
    for sign in (1, -1):
        moved = relaxed.copy()
        moved.positions[0, 0] += sign * 0.01
        force.append(relaxed.calc.get_forces(moved)[0, 0])
    stiffness = (force[1] - force[0]) / 0.02  # eV/Å^2
    square = 2 * stiffness / relaxed.get_masses()[0]
    kelvin = np.sign(square) * np.sqrt(abs(square)) * units._hbar * (1e10 * np.sqrt(units._e / units._amu)) / units._k
    assert abs(kelvin) > 50
    assert found["avg_freq"] == pytest.approx(kelvin / 2, rel=0.02), "three modes of six"
    out = capsys.readouterr().out
    assert re.search(r"diamond +-?[\d.]+", out) and "highest frequency (K)" in out and str(folder) in out


def test_elastic_constants(
    launch: Callable, repo: Path, checkpoint: Path, relaxed: Atoms, elsewhere: Path, capsys
) -> None:
    """The tensor has the crystal's symmetry, and its bulk modulus is the curvature of the energy, V d2E/dV2."""
    launch(repo / "configs" / "evaluate" / "elasticity.yaml", f"checkpoint={checkpoint}", "job.device_type=CPU")
    found = table(elsewhere / "runs" / "elasticity", "elasticity*.json.gz")
    assert found["sid"] == "diamond" and found["errors"] == ""
    tensor = np.array(found["elastic_tensor"])
    assert tensor[0, 0] == pytest.approx(tensor[1, 1], rel=1e-3) and tensor[0, 1] == pytest.approx(
        tensor[0, 2], rel=1e-3
    )

    volume, energies = relaxed.get_volume(), []
    for strain in (-0.005, 0.0, 0.005):
        scaled = relaxed.copy()
        scaled.set_cell(relaxed.cell * (1 + strain), scale_atoms=True)
        energies.append(relaxed.calc.get_potential_energy(scaled))
    curvature = (energies[0] - 2 * energies[1] + energies[2]) / 0.005**2
    modulus = curvature / (9 * volume) / units.GPa
    assert found["bulk_modulus_vrh"] == pytest.approx(modulus, rel=0.05)
    assert (tensor[0, 0] + 2 * tensor[0, 1]) / 3 == pytest.approx(modulus, rel=0.05)
    assert re.search(rf"diamond +{found['bulk_modulus_vrh']:.4g} ", capsys.readouterr().out)


def test_a_crystal_that_fails_is_an_error_at_the_end(
    write_checkpoint: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    """fairchem's runner records an exception and goes on; ours says so in the end, after the table is written."""
    checkpoint = write_checkpoint(tmp_path / "light.pt", max_num_elements=10)
    write(tmp_path / "two.xyz", [bulk("Ge", "diamond", a=5.7), bulk("Si", "diamond", a=5.4)])
    runner = ElasticConstantsRunner(str(checkpoint), str(tmp_path / "two.xyz"), inference="batch")
    results = runner.calculate()
    failed = r"2 of 2 crystals failed, two\[0\]: ValueError\(.*expected 1 to 10.*Z = 32.*; two\[1\].*Z = 14"
    with pytest.raises(CrystalsFailed, match=failed):
        runner.write_results(results, str(tmp_path))
    assert (tmp_path / "elasticity_1-0.json.gz").is_file()
    assert "failed: ValueError" in capsys.readouterr().out


@needs_phonopy
def test_errors(write_checkpoint, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ion = bulk("C", "diamond", a=3.57)
    ion.info["charge"] = 1
    write(tmp_path / "ion.xyz", ion)
    for structures, message in (
        ("H2O", "structures: expected crystals, periodic in three directions, got H2O"),
        (str(tmp_path / "ion.xyz"), "structures: expected charge 0 and spin 1, .* got charge 1 and spin 1 in ion"),
    ):
        with pytest.raises(ValueError, match=message):
            load_crystals(structures)
    out = str(tmp_path / "out")
    for keys, error, message in (
        ({"checkpoint": str(tmp_path / "absent.pt")}, FileNotFoundError, "checkpoint: .* does not exist"),
        ({"structures": "nowhere.cif"}, FileNotFoundError, "structures: .* no file .*nowhere.cif"),
        ({"supercell": [2, 2]}, ValueError, r"supercell: expected three positive integers, got \[2, 2\]"),
        ({"displacement": 0}, ValueError, "displacement: expected a positive number of Å, got 0"),
        ({"precision": "half"}, ValueError, "precision: expected one of auto, float64, float32, got 'half'"),
    ):
        with pytest.raises(error, match=message):
            PhononRunner(**{"checkpoint": str(checkpoint), "structures": "diamond", "output_dir": out} | keys)
    heads = {
        "energy": {"module": "e2former_fairchem.heads.E2FormerV2EnergyHead"},
        "forces": {"module": "e2former_fairchem.heads.E2FormerV2DirectForceHead"},
    }
    direct = write_checkpoint(tmp_path / "direct.pt", heads=heads, direct_forces=True)
    with pytest.raises(ValueError, match="checkpoint: expected a model with stress, .* got one with direct forces"):
        PhononRunner(str(direct), "diamond", out)
    for package in ("phonopy", "pymatgen"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(ModuleNotFoundError, match="expected phonopy and pymatgen to be installed: pip install phonopy"):
        PhononRunner(str(checkpoint), "diamond", out)
    assert not Path(out).exists()
