"""FAIRChemCalculator on our checkpoints: molecules, crystals, atoms, defaults of charge and spin."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "conserving.pt")


@pytest.fixture(scope="module")
def calculator(checkpoint) -> FAIRChemCalculator:
    settings = InferenceSettings(base_precision_dtype=torch.float64)
    return FAIRChemCalculator(MLIPPredictUnit(str(checkpoint), "cpu", inference_settings=settings), task_name="omol")


def attach(atoms: Atoms, calculator: FAIRChemCalculator) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms


def test_forces_and_stress_are_derivatives_of_the_energy(calculator, structures) -> None:
    atoms = attach(structures["crystal"], calculator)
    forces, stress = atoms.get_forces(), voigt_6_to_full_3x3_stress(atoms.get_stress())
    step = 1e-4

    def energy(atom: int = 0, shift=(0, 0, 0), strain=0.0) -> float:
        moved = atoms.copy()
        moved.positions[atom] += shift
        moved.set_cell(moved.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        return attach(moved, calculator).get_potential_energy()

    for axis in range(3):
        shift = step * np.eye(3)[axis]
        numeric = -(energy(1, shift) - energy(1, -shift)) / (2 * step)
        assert abs(numeric - forces[1, axis]) < 1e-5 * np.abs(forces).max()
    strain = np.zeros((3, 3))
    strain[0, 1] = strain[1, 0] = 0.5 * step
    numeric = (energy(strain=strain) - energy(strain=-strain)) / (2 * step * atoms.get_volume())
    assert abs(numeric - stress[0, 1]) < 1e-5 * np.abs(stress).max()


def test_single_atoms_and_ions(calculator) -> None:
    energies = {}
    for symbol, charge in (("H", 0), ("He", 0), ("Li", 1), ("Li", 0)):
        atoms = attach(Atoms(symbol, info={"charge": charge, "spin": 1}), calculator)
        energies[symbol, charge] = atoms.get_potential_energy()
        assert np.array_equal(atoms.get_forces(), np.zeros((1, 3)))
    assert np.isfinite(list(energies.values())).all()
    assert len(set(energies.values())) == 4, "an isolated atom's energy knows its element and charge"


def test_supercell_and_box_do_not_matter(calculator, structures) -> None:
    crystal = structures["crystal"]
    one = attach(crystal, calculator).get_potential_energy()
    shift = 0.5  # the normaliser's mean is added once per structure
    assert attach(crystal * (2, 1, 1), calculator).get_potential_energy() - shift == pytest.approx(2 * (one - shift))
    free = attach(structures["ethanol"], calculator)
    boxed = structures["ethanol"].copy()
    boxed.center(vacuum=120.0)
    boxed.pbc = True
    boxed = attach(boxed, calculator)
    assert boxed.get_potential_energy() == pytest.approx(free.get_potential_energy(), abs=1e-9)
    assert np.allclose(boxed.get_forces(), free.get_forces(), atol=1e-9)


def test_relaxation_and_dynamics_run(calculator, structures) -> None:
    molecule = attach(structures["water"], calculator)
    before = molecule.get_potential_energy()
    FIRE(molecule, logfile=None).run(fmax=1e-3, steps=5)
    assert molecule.get_potential_energy() < before
    VelocityVerlet(molecule, timestep=0.1).run(3)
    crystal = attach(structures["crystal"], calculator)
    FIRE(FrechetCellFilter(crystal), logfile=None).run(fmax=1e-4, steps=2)
    assert np.isfinite(crystal.get_stress()).all()


def test_missing_charge_and_spin_take_fairchems_defaults(calculator, structures, caplog) -> None:
    atoms = structures["ethanol"].copy()
    atoms.info.clear()
    with caplog.at_level(logging.WARNING):
        energy = attach(atoms, calculator).get_potential_energy()
    assert "charge is not set" in caplog.text and "spin multiplicity is not set" in caplog.text
    assert energy == attach(structures["ethanol"], calculator).get_potential_energy()


def test_other_spellings_of_charge_and_spin(calculator, structures) -> None:
    """They count where ours are missing; what contradicts ours, or is no integer, is refused."""
    atoms = structures["ethanol"].copy()
    atoms.info = {"charge": 1, "spin": 2}
    expected = attach(atoms, calculator).get_potential_energy()
    for info in ({"total_charge": 1, "multiplicity": 2}, {"charge": 1, "spin_multiplicity": 2, "total_charge": 1}):
        atoms.info = info
        assert attach(atoms, calculator).get_potential_energy() == expected
    for info, message in (
        ({"charge": 0, "total_charge": 1}, "charge: expected one value .*, got total_charge=1, charge=0"),
        ({"multiplicity": 1.5}, "multiplicity: expected an integer .*, got 1.5"),
    ):
        atoms.info = info
        with pytest.raises(ValueError, match=message):
            attach(atoms, calculator).get_potential_energy()


def test_spin_zero_is_accepted_and_said_once(calculator, structures, caplog, nothing_said) -> None:
    atoms = structures["ethanol"].copy()
    atoms.info["spin"] = 0
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            atoms.positions[0, 0] += 0.01
            assert np.isfinite(attach(atoms, calculator).get_potential_energy())
    said = [record for record in caplog.records if "not given" in record.getMessage() and "calc" not in record.name]
    assert len(said) == len({record.getMessage() for record in said}) and said


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        ({"charge": 101, "spin": 1}, ValueError, "Invalid value for charge: 101.*-100 to 100"),
        ({"charge": 0, "spin": 101}, ValueError, "Invalid value for spin: 101.*0 to 100"),
        ({"charge": 0, "spin": -1}, ValueError, "Invalid value for spin: -1"),
        ({"charge": 0.5, "spin": 1}, TypeError, "Invalid type for charge"),
    ],
)
def test_charge_and_spin_out_of_range(info, error, message, calculator, structures) -> None:
    atoms = structures["water"].copy()
    atoms.info.update(info)
    with pytest.raises(error, match=message):
        attach(atoms, calculator).get_potential_energy()


def test_external_graph(checkpoint, calculator, structures, write_checkpoint, tmp_path) -> None:
    """Edges of fairchem's calculator (6 Å): the same numbers for a 5 Å model; refused where atoms would be missing."""
    settings = InferenceSettings(external_graph_gen=True, base_precision_dtype=torch.float64)

    def external(path) -> FAIRChemCalculator:
        found = FAIRChemCalculator(MLIPPredictUnit(str(path), "cpu", inference_settings=settings))
        # fairchem's other method; its default needs pymatgen, which fairchem does not install
        found.a2g = partial(found.a2g, external_graph_method="nvidia")
        return found

    mine = external(checkpoint)
    expected, found = attach(structures["crystal"], calculator), attach(structures["crystal"], mine)
    assert found.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-9)
    assert np.allclose(found.get_forces(), expected.get_forces(), atol=1e-9)
    dense = structures["crystal"].copy()
    dense.set_cell(0.5 * dense.cell.array, scale_atoms=True)
    with pytest.raises(ValueError, match="external_graph_gen: atom 0 has 300 neighbours.*at most 300"):
        attach(dense, mine).get_potential_energy()
    too_long = external(write_checkpoint(tmp_path / "long.pt", cutoff=7.5))
    with pytest.raises(ValueError, match=r"external graph ends at 6.0 Å, expected at least.* 7.5 Å"):
        attach(structures["crystal"], too_long).get_potential_energy()
