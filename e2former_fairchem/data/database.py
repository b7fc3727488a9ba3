"""fairchem's data set of ASE databases, with every structure checked when it is read."""

from __future__ import annotations

from typing import Any

from ase import Atoms
from fairchem.core.common.registry import registry
from fairchem.core.datasets.ase_datasets import AseDBDataset
from fairchem.core.datasets.atomic_data import AtomicData

from e2former_fairchem.data.structures import check_structure, whole_number


class StructureError(ValueError):
    """A structure of a data set that cannot be used, by its number."""


@registry.register_dataset("e2former_ase_db")
class CheckedAseDBDataset(AseDBDataset):
    """fairchem's `ase_db`, for configs: `format: e2former_fairchem.data.database.CheckedAseDBDataset`.

    Charge and spin that `a2g_args.r_data_keys` names must be there in every structure, as integers (to 1e-3, rounded).
    Structures have their number as id where the data set gives none, so that messages can name them.

    Raises:
        StructureError: a structure that cannot be read or converted, or that `data.structures` refuses.
    """

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        super().__init__(config, **options)
        given = (config.get("a2g_args") or {}).get("r_data_keys") or ()
        self._integers = [key for key in ("charge", "spin") if key in given]

    def get_atoms(self, idx: int) -> Atoms:
        """Structure `idx`, with charge and spin as integers in its info.

        Raises:
            StructureError: it cannot be read, or is no structure for a network.
        """
        try:
            atoms = super().get_atoms(idx)
        except Exception as err:  # a torn row ends in whatever lmdb, zlib, json or ASE raise
            raise self._error(idx, f"cannot be read ({type(err).__name__}: {err})") from err
        try:
            check_structure(atoms)
            atoms.info.update({key: whole_number(atoms.info, key) for key in self._integers})
        except ValueError as err:
            raise self._error(idx, err) from err
        atoms.info["sid"] = str(atoms.info["sid"])  # fairchem drops an id that is no string
        return atoms

    def __getitem__(self, idx: int | slice) -> AtomicData | list[AtomicData]:
        """Structure `idx` as fairchem's batches want it."""
        try:
            return super().__getitem__(idx)
        except StructureError:
            raise
        except Exception as err:
            raise self._error(idx, f"cannot be converted ({type(err).__name__}: {err})") from err

    def _error(self, idx: int, problem: object) -> StructureError:
        return StructureError(f"structure {idx} of {self.config['src']}: {problem}")
