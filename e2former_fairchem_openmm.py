"""OpenMM: any fairchem checkpoint as a potential of openmm-ml, by its entry-point group `openmmml.potentials`.

It lies beside the package: openmm-ml imports all potentials that are installed, and the package's import takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openmm import System
from openmm.app import Topology
from openmmml.mlpotential import MLPotentialImplFactory
from openmmml.models.asepotential import ASEPotentialImpl


class FairchemPotential(ASEPotentialImpl):
    """fairchem's calculator in OpenMM: openmm-ml's potential for ASE's calculators converts units, box and forces."""

    def __init__(self, name: str, checkpoint: str | Path, task_name: str | None, options: dict[str, Any]) -> None:
        from fairchem.core.calculate.ase_calculator import FAIRChemCalculator

        super().__init__(name)
        self.calculator = FAIRChemCalculator.from_model_checkpoint(str(checkpoint), task_name, **options)

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


class FairchemPotentialFactory(MLPotentialImplFactory):
    """Makes the potential ``e2former-fairchem``."""

    def createImpl(
        self, name: str, checkpoint: str | Path, task_name: str | None = None, **options: Any
    ) -> FairchemPotential:
        """As openmm-ml asks for.

        Args:
            name: the potential's.
            checkpoint: path of an inference checkpoint of a fairchem model.
            task_name: as of fairchem's calculator; may be left out where the checkpoint has one.
            options: further arguments of `FAIRChemCalculator.from_model_checkpoint`.
        """
        return FairchemPotential(name, checkpoint, task_name, options)
