"""What can be had of fairchem's ASE calculator: several checkpoints as one, dispersion, node embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase.calculators.mixing import AverageCalculator
from ase.data import chemical_symbols
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator
from fairchem.core.calculate.dftd3_calculator import DFTD3Calculator
from fairchem.core.units.mlip_unit import MLIPPredictUnit
from fairchem.core.units.mlip_unit.utils import tf32_context_manager
from torch import Tensor

from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import check_checkpoint_path, read_checkpoint

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["DispersionCalculator", "Embeddings", "EnsembleCalculator", "embeddings"]


class _ChargeAndSpinCount:
    """Results are old where `atoms.info` changed, too: ASE compares positions, elements and cell only."""

    def calculate(self, atoms: Atoms, properties: list[str], system_changes: list[str]) -> None:
        super().calculate(atoms, properties, system_changes)
        self.atoms = atoms.copy()  # fairchem's calculator writes a missing charge into the atoms that it is given

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        return super().check_state(atoms, tol) or (["info"] if self.atoms.info != atoms.info else [])


def _level_of_theory(checkpoint: str | Path) -> str | None:
    return read_card(read_checkpoint(checkpoint, any_backbone=True)).get("level_of_theory")


def _member(checkpoint: str, task_name: str | None, options: dict[str, Any]) -> tuple[FAIRChemCalculator, dict]:
    """A calculator, and what it must have in common with the others of an ensemble, by name."""
    path, level = str(check_checkpoint_path(checkpoint)), _level_of_theory(checkpoint)
    try:
        calculator = FAIRChemCalculator.from_model_checkpoint(path, task_name, **options)
    except (RuntimeError, ValueError) as err:
        raise ValueError(f"{checkpoint}: {err}") from err
    properties = ", ".join(sorted(calculator.implemented_properties))
    facts = {"task": calculator.task_name, "properties": properties, "level of theory": level}
    for task in calculator.predictor.dataset_to_tasks[calculator.task_name]:
        if task.property == "energy" and task.element_references is not None:
            values = np.nan_to_num(task.element_references.element_references.cpu().numpy()).round(4)
            of_charge, values[0] = float(values[0]), 0.0
            facts |= {f"element reference of {chemical_symbols[z]}": float(values[z]) for z in np.flatnonzero(values)}
            facts["reference of the charge"] = of_charge
    return calculator, facts


class EnsembleCalculator(_ChargeAndSpinCount, AverageCalculator):
    """Several checkpoints as one ASE calculator: means, and the spread of the members as a measure of uncertainty.

    ``results`` has the means of energy, forces and stress, and for n members x_m with the mean x

    - ``energy_std``: `sqrt(sum_m (E_m - E)^2 / (n - 1))`, eV, of the whole structure,
    - ``forces_std`` [N]: `sqrt(sum_m |F_m - F|^2 / (n - 1))` of each atom, eV/Å,
    - ``energy_contributions``, ``forces_contributions``, ...: lists of the members' own (ASE's `AverageCalculator`).

    Every member gets the same atoms, with their charge and multiplicity. Members cost n evaluations and the memory of n
    networks.

    Args:
        checkpoints: two or more inference checkpoints of fairchem models, of any backbone: paths or `pretrained` names.
        task_name: as of fairchem's calculator; may be left out where the checkpoints have one.
        options: further arguments of `FAIRChemCalculator.from_model_checkpoint`, for every member.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: fewer than two checkpoints, or members that differ in task, properties, level of theory (the card's)
            or element references (more than 0.1 meV).
    """

    def __init__(self, checkpoints: Sequence[str | Path], task_name: str | None = None, **options: Any) -> None:
        paths = [str(path) for path in checkpoints]
        if len(paths) < 2:
            raise ValueError(f"checkpoints: expected two or more, got {paths}")
        members, facts = zip(*(_member(path, task_name, options) for path in paths), strict=True)
        for path, other in zip(paths, facts, strict=True):
            for name in facts[0] | other:
                expected, found = facts[0].get(name), other.get(name)
                if expected != found:
                    raise ValueError(f"{path}: expected the {name} of {paths[0]}, {expected}, got {found}")
        super().__init__(members)

    def calculate(self, atoms: Atoms, properties: list[str], system_changes: list[str]) -> None:
        """ASE's interface; see the class for what ``results`` has."""
        super().calculate(atoms, properties, system_changes)
        self.results["energy_std"] = float(np.std(self.results["energy_contributions"], ddof=1))
        if "forces" in self.results:
            variance = np.var(self.results["forces_contributions"], axis=0, ddof=1)  # [N, 3]
            self.results["forces_std"] = np.sqrt(variance.sum(1))


class DispersionCalculator(_ChargeAndSpinCount, DFTD3Calculator):
    """A checkpoint that learned plain PBE, with the dispersion of PBE-D3(BJ) that its labels lack.

    The sum is fairchem's `DFTD3Calculator`, which knows more functionals and has no way to tell which one a checkpoint
    learned. Here its card says so. ``results`` has energy, forces and stress with dispersion, and both parts as
    ``energy_contributions`` (eV), ``forces_contributions`` (eV/Å), ``stress_contributions`` (eV/Å^3). Stress is that
    of periodic structures. The cutoff of dispersion is 15 Å.

    Args:
        checkpoint: path of an inference checkpoint of a fairchem model, of any backbone.
        task_name: as of fairchem's calculator; may be left out where the checkpoint has one.
        param_file: D3's coefficients. None takes fairchem's, `~/.cache/nvalchemiops/dftd3_parameters.pt`, for
            which fairchem downloads D3's source the first time.
        options: further arguments of `FAIRChemCalculator.from_model_checkpoint`.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: the level of theory on the checkpoint's card is not PBE (`PBE`, or `PBE/` and a basis), or none is
            on it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        task_name: str | None = None,
        param_file: str | Path | None = None,
        **options: Any,
    ) -> None:
        level = _level_of_theory(checkpoint)
        if level is None or level.partition("/")[0].strip().upper() != "PBE":
            raise ValueError(f"{checkpoint}: expected the level of theory PBE, for which this D3 is, got {level}")
        calculator = FAIRChemCalculator.from_model_checkpoint(str(checkpoint), task_name, **options)
        super().__init__(calculator, "pbe", device=options.get("device"), param_file=param_file)


class Embeddings(NamedTuple):
    """What the network knows of each atom and its surroundings.

    Both are on the calculator's device, in its precision, and without gradients.
    """

    #: [N, C], the same in every orientation.
    invariant: Tensor
    #: [N, (lmax+1)^2, C] in e3nn's order and sign, in which rows l^2 to (l+1)^2 - 1 turn as the spherical harmonics of
    #: degree l (row 0 is `invariant`, and rows 1 to 3 turn as x, y, z).
    equivariant: Tensor


def embeddings(calculator: FAIRChemCalculator, atoms: Atoms) -> Embeddings:
    """Node embeddings of a structure: the network's output, from which the heads make energies and forces.

    Args:
        calculator: fairchem's, with a checkpoint of this network and one worker.
        atoms: the structure, charge and multiplicity in its info as for an energy, which is evaluated too where the
            calculator has not done it already.

    Raises:
        TypeError: another backbone, or several workers.
    """
    predictor = calculator.predictor
    backbone = predictor.model.module.backbone if isinstance(predictor, MLIPPredictUnit) else predictor
    if not isinstance(backbone, E2FormerV2Backbone):
        raise TypeError(f"calculator: expected one E2FormerV2Backbone in this process, got {type(backbone).__name__}")
    calculator.get_property("energy", atoms)  # checks the structure; fairchem moves and freezes the weights in it
    with tf32_context_manager(predictor.inference_settings.tf32):
        found = backbone(calculator.a2g(atoms).to(predictor.device))["node_embedding"].detach()
    return Embeddings(found[:, 0], found)
