"""Phonons and elastic constants of crystals with fairchem's own runners, from a checkpoint and a file of structures.

fairchem's `MDRPhononRunner` and `ElasticityRunner` do the work and write their tables. What is added: structures from
any file that ASE reads, a check of everything that can be checked before the first relaxation, double precision (force
constants are differences of forces), a table on screen, and an error at the end where fairchem's runners only fill a
column `errors`.
"""

from __future__ import annotations

import importlib.util
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from fairchem.core.components.calculate import ElasticityRunner, MDRPhononRunner

from e2former_fairchem.compat import CalculateRunner
from e2former_fairchem.leaderboard.predictor import check_model
from e2former_fairchem.pes.potential import PRECISIONS, Potential
from e2former_fairchem.pes.systems import load_systems
from e2former_fairchem.training.signals import end_on_signal


class CrystalsFailed(RuntimeError):
    """fairchem's runner could not compute some of the crystals; its table is written."""


def load_crystals(specs: str | Sequence[str]) -> list[tuple[str, Atoms]]:
    """Crystals with names, see `pes.systems.load_systems`.

    Raises:
        ValueError: a structure that is not periodic in three directions, or that is charged or has unpaired electrons:
            the recipes pass structures through pymatgen, which drops both.
    """
    names = [specs] if isinstance(specs, str) else list(specs)
    found = load_systems(names, "structures", min_atoms=1)
    for name, atoms in found:
        if not atoms.pbc.all():
            raise ValueError(
                f"structures: expected crystals, periodic in three directions, got {name} with {atoms.pbc}"
            )
        charge, spin = int(atoms.info["charge"]), int(atoms.info["spin"])
        if charge != 0 or spin not in (0, 1):
            raise ValueError(
                f"structures: expected charge 0 and spin 1, which is all that fairchem's recipe keeps, got charge "
                f"{charge} and spin {spin} in {name}"
            )
    return found


def require(*packages: str) -> None:
    """Check that packages are there.

    Raises:
        ModuleNotFoundError: with the line that installs them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"expected {' and '.join(missing)} to be installed: pip install {' '.join(missing)}")


def load_calculator(checkpoint: str, task_name: str, inference: Any, precision: str) -> Calculator:
    """ASE calculator of a checkpoint, see `pes.potential.Potential.load`; on the GPU where there is one.

    Raises:
        ValueError: the model has no stress, and the recipes relax cells.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    potential = Potential.load(checkpoint, task_name, inference, precision, device, max_atoms=2048)
    if "stress" not in potential.calculator.implemented_properties:
        why = "direct forces" if potential.direct_forces else "no stress"
        raise ValueError(f"checkpoint: expected a model with stress, to relax cells, got one with {why}: {checkpoint}")
    return potential.calculator


class CrystalRunner(CalculateRunner):
    """A runner of fairchem's with checks before, and a table and an error after.

    fairchem's runner is held and not inherited from: its decorator turns `MDRPhononRunner` into a function.

    Args:
        inner: fairchem's runner.
    """

    #: Column of the results, what it is called on screen, its unit.
    columns: tuple[tuple[str, str, str], ...]

    def __init__(self, inner: CalculateRunner) -> None:
        super().__init__(inner.calculator, inner.input_data)
        self.inner = inner

    def calculate(self, job_num: int = 0, num_jobs: int = 1) -> list[dict[str, Any]]:
        """One dictionary for each crystal of this job."""
        end_on_signal()
        return self.inner.calculate(job_num, num_jobs)

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """As fairchem's runner: results are written at the end of a job."""
        return self.inner.save_state(checkpoint_location, is_preemption)

    @abstractmethod
    def row(self, result: dict[str, Any]) -> dict[str, float]:
        """The numbers of one crystal by column."""

    def write_results(
        self, results: list[dict[str, Any]], results_dir: str, job_num: int = 0, num_jobs: int = 1
    ) -> None:
        """Write fairchem's table, print ours.

        Raises:
            CrystalsFailed: fairchem's runner recorded an exception instead of numbers.
        """
        self.inner.write_results(results, results_dir, job_num, num_jobs)
        wide = max(7, *(len(str(result["sid"])) for result in results)) if results else 7
        print("crystal".ljust(wide), *(f"{name} ({unit})" for _, name, unit in self.columns), sep="  ")
        failed = []
        for result in results:
            if result["errors"]:
                failed.append(f"{result['sid']}: {result['errors']}")
                print(str(result["sid"]).ljust(wide), f"failed: {result['errors']}", sep="  ")
                continue
            values = self.row(result)
            cells = (f"{values[key]:.4g}".rjust(len(f"{name} ({unit})")) for key, name, unit in self.columns)
            print(str(result["sid"]).ljust(wide), *cells, sep="  ")
        print(f"results: {Path(results_dir).absolute()}", flush=True)
        if failed:
            raise CrystalsFailed(f"{len(failed)} of {len(results)} crystals failed, {'; '.join(failed)}")


class PhononRunner(CrystalRunner):
    """`MDRPhononRunner` on structures of one's own: relaxation of cell and positions, finite displacements, phonopy.

    Args:
        checkpoint: path of an inference checkpoint, or the name of a model that fairchem downloads.
        structures: crystals, see `load_crystals`.
        output_dir: folder for the phonopy files that fairchem's runner reads.
        supercell: repeats of the given cell along its axes.
        displacement: of an atom, Å.
        task_name, inference, precision: see `pes.potential.Potential.load`.

    Raises:
        ModuleNotFoundError: phonopy or pymatgen is missing.
        ValueError, FileNotFoundError: a wrong value.
    """

    columns = (
        ("max_freq", "highest frequency", "K"),
        ("avg_freq", "mean frequency", "K"),
        ("entropy", "entropy at 300 K", "J/K/mol"),
        ("heat_capacity", "heat capacity at 300 K", "J/K/mol"),
        ("free_energy", "free energy at 300 K", "kJ/mol"),
    )

    def __init__(
        self,
        checkpoint: str | None,
        structures: str | Sequence[str],
        output_dir: str,
        supercell: Sequence[int] = (2, 2, 2),
        displacement: float = 0.01,
        task_name: str = "omol",
        inference: Any = "batch",
        precision: str = "auto",
    ) -> None:
        require("phonopy", "pymatgen")
        _check(precision)
        supercell = list(supercell)
        if len(supercell) != 3 or not all(isinstance(n, int) and n > 0 for n in supercell):
            raise ValueError(f"supercell: expected three positive integers, got {supercell}")
        if not (isinstance(displacement, int | float) and math.isfinite(displacement) and displacement > 0):
            raise ValueError(f"displacement: expected a positive number of Å, got {displacement!r}")
        checkpoint = check_model(checkpoint)
        crystals = load_crystals(structures)
        calculator = load_calculator(checkpoint, task_name, inference, precision)
        files = _phonopy_files(crystals, supercell, Path(output_dir).absolute() / "phonopy")
        super().__init__(MDRPhononRunner(calculator, files, displacement))

    def row(self, result: dict[str, Any]) -> dict[str, float]:
        """As fairchem names them."""
        return {key: float(result[key]) for key, _, _ in self.columns}


class ElasticConstantsRunner(CrystalRunner):
    """`ElasticityRunner` on structures of one's own: relaxation, 24 strained cells, a fit of the elastic tensor.

    Args:
        checkpoint: path of an inference checkpoint, or the name of a model that fairchem downloads.
        structures: crystals, see `load_crystals`.
        task_name, inference, precision: see `pes.potential.Potential.load`.

    Raises:
        ModuleNotFoundError: pymatgen is missing.
        ValueError, FileNotFoundError: a wrong value.
    """

    columns = (
        ("bulk", "bulk modulus", "GPa"),
        ("shear", "shear modulus", "GPa"),
        ("c11", "C11", "GPa"),
        ("c12", "C12", "GPa"),
        ("c44", "C44", "GPa"),
    )

    def __init__(
        self,
        checkpoint: str | None,
        structures: str | Sequence[str],
        task_name: str = "omol",
        inference: Any = "batch",
        precision: str = "auto",
    ) -> None:
        require("pymatgen")
        _check(precision)
        checkpoint = check_model(checkpoint)
        crystals = load_crystals(structures)
        for name, atoms in crystals:
            atoms.info["sid"] = name  # fairchem's runner dies of its own error message without
        calculator = load_calculator(checkpoint, task_name, inference, precision)
        super().__init__(ElasticityRunner(calculator, [atoms for _, atoms in crystals]))

    def row(self, result: dict[str, Any]) -> dict[str, float]:
        """Voigt, Reuss and Hill's averages, and three entries of the tensor."""
        tensor = np.asarray(result["elastic_tensor"])
        return {
            "bulk": float(result["bulk_modulus_vrh"]),
            "shear": float(result["shear_modulus_vrh"]),
            "c11": float(tensor[0, 0]),
            "c12": float(tensor[0, 1]),
            "c44": float(tensor[3, 3]),
        }


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def _phonopy_files(crystals: list[tuple[str, Atoms]], supercell: Sequence[int], folder: Path) -> list[Path]:
    """The files that `MDRPhononRunner` reads: cell and supercell, no displacements of our own."""
    from fairchem.core.components.calculate.recipes.phonons import get_phonopy_object

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, atoms in crystals:
        # fairchem takes what stands before the first dot for the name.
        file = folder / f"{name.replace('.', '_')}.yaml"
        get_phonopy_object(atoms, supercell_matrix=np.diag(supercell)).save(file)
        files.append(file)
    return files
