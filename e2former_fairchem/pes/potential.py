"""The model under test: energies and forces of many structures at once, in double precision where it can."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator

from e2former_fairchem.leaderboard.predictor import Predictor, inference_settings
from e2former_fairchem.pes.rounding import energy_rounding
from e2former_fairchem.training.checkpoint import read_checkpoint

PRECISIONS = ("auto", "float64", "float32")


@dataclass
class Potential:
    """A loaded checkpoint.

    Attributes:
        predictor: predicts batches.
        max_atoms: atoms of a batch.
        precision: `float64` or `float32`, of weights and positions.
        note: why it is not in double precision, or empty.
    """

    predictor: Predictor
    max_atoms: int
    precision: str
    note: str = ""

    @classmethod
    def load(
        cls, checkpoint: str, task_name: str, inference: Any, precision: str, device: str, max_atoms: int
    ) -> Potential:
        """Load a checkpoint.

        Args:
            checkpoint: path, or name of a model that fairchem downloads.
            task_name: data set of the checkpoint whose energies and forces are checked.
            inference: preset of fairchem's inference settings or changes of the preset `batch`.
            precision: `float64`, `float32`, or `auto`: float64, and float32 where the model cannot.
            device: `cpu` or `cuda`.
            max_atoms: atoms of a batch.

        Raises:
            ValueError: not a fairchem inference checkpoint, or one without energies or forces for `task_name`.
        """
        if Path(checkpoint).is_file():
            read_checkpoint(checkpoint, any_backbone=True)
        settings = inference_settings(inference)
        note = ""
        for name in ("float64", "float32") if precision == "auto" else (precision,):
            one = replace(settings, base_precision_dtype=getattr(torch, name))
            try:
                found = cls(Predictor(checkpoint, task_name, one, device), max_atoms, name, note)
                if precision == "auto" and name == "float64":
                    element = (found.elements or ("H",))[0]
                    found.evaluate([Atoms([element] * 2, [[0, 0, 0], [0, 0, 1]], info={"charge": 0, "spin": 1})])
                return found
            except (RuntimeError, TypeError, NotImplementedError) as err:
                if precision != "auto" or name == "float32":
                    raise
                note = f"single precision: the model does not run in float64 ({type(err).__name__}: {err})"
                logging.warning("pes: %s", note)
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")

    def evaluate(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Energies [n] in eV and forces, [atoms, 3] each, in eV/Å, both float64.

        Raises:
            Exception: what the first structure that failed raised.
        """
        energies, forces = [], []
        start = 0
        while start < len(structures):
            end, atoms = start, 0
            while end < len(structures) and (end == start or atoms + len(structures[end]) <= self.max_atoms):
                atoms += len(structures[end])
                end += 1
            # A copy: fairchem's checks write charge and spin into the structure.
            for result in self.predictor.predict_atoms([one.copy() for one in structures[start:end]]):
                if isinstance(result, Exception):
                    raise result
                energies.append(result[0])
                forces.append(result[1])
            start = end
        return np.array(energies), forces

    @property
    def calculator(self) -> Calculator:
        """ASE calculator of the same model."""
        return self.predictor.calculator

    def resolution(self, atoms: Atoms) -> float:
        """What rounding can do to the energy of a structure, eV; see `rounding`."""
        eps = float(torch.finfo(getattr(torch, self.precision)).eps)
        return energy_rounding(lambda structures: self.evaluate(structures)[0], atoms, eps)

    @property
    def _backbone(self) -> Any:
        return self.predictor.unit.model.module.backbone

    @property
    def cutoff(self) -> float | None:
        """Cutoff in Å, or None where the backbone has no such attribute."""
        found = getattr(self._backbone, "cutoff", None)
        return None if found is None else float(found)

    @property
    def elements(self) -> tuple[str, ...] | None:
        """Symbols of the elements that training has seen, or None where the checkpoint does not know."""
        return getattr(self._backbone, "elements", None)

    @property
    def direct_forces(self) -> bool:
        """Whether forces come from a head of their own, and not from the energy's gradient."""
        return bool(getattr(getattr(self._backbone, "regress_config", None), "direct_forces", False))

    @property
    def mirror_images_differ(self) -> bool:
        """Whether the backbone is one of ours that was built without reflection equivariance."""
        config = getattr(self._backbone, "config", None)
        return getattr(config, "reflection_equivariant", None) is False

    def describe(self) -> dict[str, Any]:
        """What a report says about the model."""
        model = self.predictor.unit.model
        return {
            "backbone": f"{type(self._backbone).__module__}.{type(self._backbone).__qualname__}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "cutoff": self.cutoff,
            "elements": self.elements,
            "max_neighbors": getattr(self._backbone, "max_neighbors", None),
            "direct_forces": self.direct_forces,
            "precision": self.precision,
            "note": self.note,
        }
