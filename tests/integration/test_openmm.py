"""OpenMM, with a checkpoint that openmm-ml finds by its entry point."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
from ase import Atoms, units
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator

openmm = pytest.importorskip("openmm", reason="openmm not installed")
openmmml = pytest.importorskip("openmmml", reason="openmmml not installed")
OPTIONS = {"task_name": "omol", "inference_settings": "traineval", "device": "cpu"}
PER_MOLE = units.kJ / units.mol  # eV


@pytest.fixture(scope="module")
def checkpoint(write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small.pt", num_layers=1, cutoff=4.0)


@pytest.fixture(scope="module")
def potential(checkpoint):
    return openmmml.MLPotential("e2former-fairchem", checkpoint=checkpoint, **OPTIONS)


def simulate(potential, atoms: Atoms, **state: int):
    """A context of the structure, 0.5 fs."""
    topology = openmm.app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for symbol in atoms.get_chemical_symbols():
        topology.addAtom(symbol, openmm.app.Element.getBySymbol(symbol), residue)
    if atoms.pbc.all():
        topology.setPeriodicBoxVectors(atoms.cell.array / 10 * openmm.unit.nanometer)
    system = potential.createSystem(topology, removeCMMotion=False, **state)
    integrator = openmm.VerletIntegrator(0.5 * openmm.unit.femtosecond)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / 10)
    return context


def test_the_package_names_the_potential() -> None:
    """And costs those nothing who want another one: openmm-ml imports all."""
    found = {entry.name: entry.value for entry in entry_points(group="openmmml.potentials")}
    assert found["e2former-fairchem"] == "e2former_fairchem_openmm:FairchemPotentialFactory"
    light = "import openmmml, sys; assert not {'fairchem', 'e2former_fairchem', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True, timeout=60)


def test_energies_and_forces(potential, checkpoint, structures) -> None:
    """kJ/mol and nm, of a molecule, of an ion and of a crystal in its box."""
    calculator = FAIRChemCalculator.from_model_checkpoint(str(checkpoint), **OPTIONS)
    crystal = structures["crystal"].copy()
    crystal.set_cell([4.4, 4.5, 4.6], scale_atoms=True)
    for atoms, state in (
        (structures["ethanol"], {}),
        (structures["ammonia"], {"charge": 1, "multiplicity": 2}),
        (crystal, {}),
    ):
        expected = atoms.copy()
        expected.calc = calculator
        found = simulate(potential, atoms, **state).getState(energy=True, forces=True)
        energy, forces = found.getPotentialEnergy()._value, found.getForces(asNumpy=True)._value
        assert energy * PER_MOLE == pytest.approx(expected.get_potential_energy(), rel=1e-5)
        assert np.allclose(forces * PER_MOLE / 10, expected.get_forces(), atol=1e-5)


def test_a_name_is_a_checkpoint(structures) -> None:
    """gfn2-small comes with the package."""
    potential = openmmml.MLPotential("e2former-fairchem", checkpoint="gfn2-small", **OPTIONS)
    energy = simulate(potential, structures["water"]).getState(energy=True).getPotentialEnergy()._value
    assert energy * PER_MOLE == pytest.approx(-138.0, abs=0.5)  # eV, GFN2-xTB


def test_dynamics_conserves_energy(potential, structures) -> None:
    context = simulate(potential, structures["water"])
    context.setVelocitiesToTemperature(300, 1)

    def total() -> float:
        state = context.getState(energy=True)
        return (state.getPotentialEnergy() + state.getKineticEnergy())._value

    before = context.getState(energy=True).getKineticEnergy()._value, total()
    context.getIntegrator().step(20)
    after = context.getState(energy=True).getKineticEnergy()._value, total()
    assert abs(after[1] - before[1]) < 0.1 * abs(after[0] - before[0])


def test_unknown_arguments_and_the_models_errors_arrive(potential, structures) -> None:
    with pytest.raises(TypeError, match="spin"):
        simulate(potential, structures["water"], spin=1)
    context = simulate(potential, structures["water"], charge=500)
    with pytest.raises(Exception, match="Invalid value for charge: 500"):
        context.getState(energy=True)
