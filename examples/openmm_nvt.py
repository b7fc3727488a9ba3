"""OpenMM at 300 K (Langevin), with a checkpoint as openmm-ml's potential `e2former-fairchem`.

    pip install openmmml
    python examples/openmm_nvt.py [CHECKPOINT]

A topology with a periodic box takes the box; atoms, residues and PDB files are OpenMM's as always.
"""

from __future__ import annotations

from ase.build import molecule
from common import arguments, run


def main() -> None:
    """Print the energies at the end."""
    args = arguments(__doc__, steps=200)
    from openmm import LangevinMiddleIntegrator, app, unit
    from openmmml import MLPotential

    atoms = molecule("CH3OH")
    topology = app.Topology()
    residue = topology.addResidue("MOH", topology.addChain())
    for symbol in atoms.get_chemical_symbols():
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)

    potential = MLPotential(
        "e2former-fairchem", checkpoint=args.checkpoint, task_name="omol", inference_settings="traineval"
    )
    system = potential.createSystem(topology, charge=0, multiplicity=1)
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    simulation = app.Simulation(topology, system, integrator)
    simulation.context.setPositions(atoms.positions * unit.angstrom)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.step(args.steps)

    state = simulation.context.getState(energy=True)
    energies = (e / unit.kilojoule_per_mole for e in (state.getPotentialEnergy(), state.getKineticEnergy()))
    print("OpenMM, {} steps: potential {:.1f} kJ/mol, kinetic {:.1f} kJ/mol".format(args.steps, *energies))


if __name__ == "__main__":
    run(main)
