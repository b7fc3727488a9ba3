"""S2EF: energy and forces of every structure of a data set, batch by batch into the journal."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from fairchem.core.datasets.ase_datasets import AseDBDataset
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from e2former_fairchem.data.checks import check_dataset
from e2former_fairchem.leaderboard.predictor import Predictor, pack, reason
from e2former_fairchem.leaderboard.runner import JournalledRunner

#: Info keys that every structure must have; charge and spin change the answer, so none is guessed.
REQUIRED = ("source", "charge", "spin")


@dataclass
class Batch:
    """Structures of one batch as a loader's process gives them."""

    indices: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    data_ids: list[str] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)  # labels, eV; NaN where there is none
    forces: list[np.ndarray | None] = field(default_factory=list)  # labels, eV/Å
    data: AtomicData | list[AtomicData] = field(default_factory=list)  # a list where it cannot be collated
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # as text: not every exception can be pickled


def read_labels(atoms: Atoms) -> tuple[float, np.ndarray | None]:
    """Energy (eV, NaN where there is none) and forces ([N, 3] eV/Å, None where there are none) of a structure.

    Raises:
        ValueError: no number, or forces of another shape.
    """
    labels = atoms.calc.results if atoms.calc is not None else {}
    energy, forces = labels.get("energy"), labels.get("forces")
    try:
        energy = np.nan if energy is None else float(energy)
        forces = None if forces is None else np.asarray(forces, float)
    except (TypeError, ValueError) as err:
        raise ValueError(f"expected an energy and forces that are numbers, got {reason(err)}") from err
    if forces is not None and forces.shape != (len(atoms), 3):
        raise ValueError(f"expected forces {(len(atoms), 3)}, got {forces.shape}")
    return energy, forces


class BatchReader(Dataset):
    """Reads and collates batches of a data set; item k is batch k of `batches`."""

    def __init__(
        self, dataset: AseDBDataset, batches: Sequence[Sequence[int]], convert: Callable[[Atoms], AtomicData]
    ) -> None:
        self.dataset, self.batches, self.convert = dataset, batches, convert

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Batch:
        batch, graphs = Batch(), []
        for index in self.batches[k]:
            name = f"structure {index}"
            try:
                atoms = self.dataset.get_atoms(index)
                missing = [key for key in REQUIRED if key not in atoms.info]
                if missing:
                    raise ValueError(f"atoms.info: expected {', '.join(REQUIRED)}, got none of {', '.join(missing)}")
                name = str(atoms.info["source"])
                graph = self.convert(atoms)
            except Exception as err:  # a damaged row is this structure's failure, not the run's
                batch.failures.append((index, name, reason(err)))
                continue
            try:
                energy, forces = read_labels(atoms)
            except ValueError as err:  # nothing that is predicted depends on labels: it only leaves the scores
                logging.warning("s2ef: %s counts as unlabelled: %s", name, err)
                energy, forces = np.nan, None
            graphs.append(graph)
            batch.indices.append(index)
            batch.ids.append(name)
            batch.data_ids.append(str(atoms.info.get("data_id", "")))
            batch.energies.append(energy)
            batch.forces.append(forces)
        try:
            batch.data = atomicdata_list_to_batch(graphs) if graphs else []
        except Exception as err:  # the predictor finds out which structure is to blame
            logging.warning("s2ef: a batch of %d structures cannot be collated: %s", len(graphs), reason(err))
            batch.data = graphs
        return batch


def force_errors(predicted: np.ndarray, label: np.ndarray | None) -> tuple[float, float]:
    """Sum of the absolute errors of all components (eV/Å), and sum of the cosines between the atoms' vectors.

    Both NaN without labels. An atom whose predicted or true force is zero counts as cosine 0.
    """
    if label is None:
        return np.nan, np.nan
    norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(label, axis=1)
    dots = (predicted * label).sum(axis=1)
    return float(np.abs(predicted - label).sum()), float(np.divide(dots, norms, where=norms > 0, out=0 * dots).sum())


def pack_arrays(**arrays: np.ndarray) -> bytes:
    """Arrays as the bytes of an uncompressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class S2EFRunner(JournalledRunner):
    """Predicts a data set.

    Args:
        data: folder of .aselmdb files, or what else fairchem's `ase_db` data set reads.
        num_workers: processes that read and collate.
        options: see `JournalledRunner`.

    Raises:
        ValueError, FileNotFoundError: see `JournalledRunner` and `data.checks.check_dataset`.
    """

    def __init__(self, data: str | None, num_workers: int = 2, **options: Any) -> None:
        super().__init__(task="s2ef", **options)
        if data is None:
            raise ValueError(
                "data: expected a folder with a data set, got nothing; add data=FOLDER to the command line"
            )
        self.data = check_dataset("data", data)
        self.num_workers = num_workers
        self.dataset = AseDBDataset(DictConfig({"src": self.data}))
        self._sizes: np.ndarray | None = None

    def sizes(self) -> Sequence[int]:
        """Number of atoms of each structure, from metadata.npz where there is one, else by reading the data set.

        Raises:
            ValueError: the metadata.npz belongs to other rows.
        """
        if self._sizes is None:
            try:
                known = self.dataset.metadata_hasattr("natoms")
            except AssertionError as err:  # fairchem's, with both numbers
                raise ValueError(f"data: expected the metadata.npz of the rows of {self.data}, got: {err}") from err
            if not known:
                logging.warning(
                    "%s has no metadata.npz with natoms: every structure is read to count its atoms", self.data
                )
                self._sizes = np.array([self._count(index) for index in range(len(self.dataset))], np.int64)
            else:
                self._sizes = np.asarray(self.dataset.get_metadata("natoms", np.arange(len(self.dataset))), np.int64)
        return self._sizes

    def _count(self, index: int) -> int:
        try:
            return len(self.dataset.get_atoms(index))
        except Exception:  # a damaged row, whose reason is recorded when it is read for its prediction
            return 0

    def identity(self) -> dict[str, Any]:
        """The data set, by its structures' sizes: a copy elsewhere is the same data set."""
        return {"data_natoms_sha256": hashlib.sha256(np.asarray(self.sizes(), "<i8").tobytes()).hexdigest()}

    def compute(self, todo: Sequence[int], predictor: Predictor) -> None:
        """Batches of similar sizes, read ahead by other processes."""
        sizes = self.sizes()
        batches = [[todo[k] for k in batch] for batch in pack([int(sizes[i]) for i in todo], self.max_atoms)]
        # Forked, so that the readers share the open data set and need no copy of the weights that `convert` refers to.
        loader = DataLoader(
            BatchReader(self.dataset, batches, predictor.convert),
            batch_size=None,
            shuffle=False,
            num_workers=self.num_workers,
            multiprocessing_context="fork" if self.num_workers else None,
        )
        for batch in loader:
            for index, name, error in batch.failures:
                self.failure(index, name, error)
            self._predict(batch, predictor)

    def _predict(self, batch: Batch, predictor: Predictor) -> None:
        good, energies, forces, errors = [], [], [], []
        for k, prediction in enumerate(predictor.predict(batch.data)):
            if isinstance(prediction, Exception):
                self.failure(batch.indices[k], batch.ids[k], reason(prediction))
                continue
            good.append(k)
            energies.append(prediction[0])
            forces.append(prediction[1])
            errors.append(force_errors(prediction[1], batch.forces[k]))
        if not good:
            return
        indices = [batch.indices[k] for k in good]
        self.result(
            indices,
            pack_arrays(
                index=np.array(indices, np.int64),
                ids=np.array([batch.ids[k] for k in good], str),
                data_ids=np.array([batch.data_ids[k] for k in good], str),
                natoms=np.array([len(f) for f in forces], np.int64),
                energy=np.array(energies, np.float64),
                forces=np.concatenate(forces),
                label_energy=np.array([batch.energies[k] for k in good], np.float64),
                force_errors=np.array(errors, np.float64),
            ),
        )
