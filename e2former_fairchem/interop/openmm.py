"""Any fairchem checkpoint as a potential of openmm-ml; `e2former_fairchem_openmm` makes it known there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fairchem.core.calculate.ase_calculator import FAIRChemCalculator
from openmm import System
from openmm.app import Topology
from openmmml.models.asepotential import ASEPotentialImpl

from e2former_fairchem.leaderboard.predictor import check_model


class FairchemPotential(ASEPotentialImpl):
    """fairchem's calculator in OpenMM: openmm-ml's potential for ASE's calculators converts units, box and forces."""

    def __init__(self, name: str, checkpoint: str | Path, task_name: str | None, options: dict[str, Any]) -> None:
        super().__init__(name)
        path = check_model(str(checkpoint))
        self.calculator = FAIRChemCalculator.from_model_checkpoint(path, task_name, **options)

    def addForces(
        self,
        topology: Topology,
        system: System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        charge: int = 0,
        multiplicity: int = 1,
    ) -> None:
        """As openmm-ml asks for.

        Args:
            topology, system, atoms, forceGroup: openmm-ml's.
            charge: total charge of the atoms with this potential; an argument of `createSystem`, as the next one.
            multiplicity: 2S+1.
        """
        info = {"charge": charge, "spin": multiplicity}
        super().addForces(topology, system, atoms, forceGroup, calculator=self.calculator, info=info)
