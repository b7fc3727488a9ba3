"""OpenMM: what openmm-ml finds by its entry-point group `openmmml.potentials`.

It lies beside the package: openmm-ml imports all potentials that are installed, and the package's import takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory


class FairchemPotentialFactory(MLPotentialImplFactory):
    """Makes the potential ``e2former-fairchem``."""

    def createImpl(
        self, name: str, checkpoint: str | Path, task_name: str | None = None, **options: Any
    ) -> MLPotentialImpl:
        """As openmm-ml asks for.

        Args:
            name: the potential's.
            checkpoint: path of an inference checkpoint of a fairchem model, or a name: gfn2-small, or of those that
                fairchem downloads.
            task_name: as of fairchem's calculator; may be left out where the checkpoint has one.
            options: further arguments of `FAIRChemCalculator.from_model_checkpoint`.
        """
        from e2former_fairchem.interop.openmm import FairchemPotential

        return FairchemPotential(name, checkpoint, task_name, options)
