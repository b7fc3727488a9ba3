"""Element references of the training frames."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from e2former_fairchem.data.references import NUM_ELEMENTS, fit_element_references, reference_energy
from e2former_fairchem.own_data.reading import Frame


def isolated_atoms(frames: Sequence[Frame]) -> dict[int, float]:
    """Energies of neutral isolated atoms by atomic number, eV; of several the lowest."""
    found: dict[int, float] = {}
    for frame in frames:
        if frame.is_isolated_atom and frame.atoms.info["charge"] == 0:
            z = int(frame.atoms.numbers[0])
            found[z] = min(frame.energy, found.get(z, math.inf))
    return found


def fit_references(frames: Sequence[Frame]) -> tuple[np.ndarray, list[str]]:
    """References for a network that starts from nothing: of isolated atoms where there are some, else least squares.

    Returns the table, eV by atomic number, [119], NaN for elements that do not occur, entry 0 per unit of charge, and
    the symbols of elements whose energies are fixed in sums only.
    """
    table = np.full(NUM_ELEMENTS + 1, math.nan)
    table[0] = 0.0
    for z, energy in isolated_atoms(frames).items():
        table[z] = energy
    known = np.isfinite(table)
    rest = [frame for frame in frames if not known[frame.atoms.numbers].all()]
    if not rest:
        return table, []
    numbers = [frame.atoms.numbers for frame in rest]
    energies = [frame.energy - table[z[known[z]]].sum() for frame, z in zip(rest, numbers, strict=True)]
    charges = [frame.atoms.info["charge"] for frame in rest]
    fitted = fit_element_references([z[~known[z]] for z in numbers], energies, charges)
    known[0] = False
    return np.where(known, table, fitted.table), fitted.undetermined


def shift_references(frames: Sequence[Frame], predicted: Sequence[float], of_checkpoint: np.ndarray) -> np.ndarray:
    """References for a network that is trained already: those of the checkpoint, moved to another level of theory.

    The least-squares change of the references that takes the predicted total energies (eV) to the given ones. The
    network's own part then starts where it was good. Elements that the frames do not have keep the checkpoint's, and so
    does the charge where all are the same.
    Returns the table as `fit_references` does.
    """
    change = fit_element_references(
        [frame.atoms.numbers for frame in frames],
        [frame.energy - energy for frame, energy in zip(frames, predicted, strict=True)],
        [frame.atoms.info["charge"] for frame in frames],
    ).table
    return np.where(np.isfinite(change), np.nan_to_num(of_checkpoint) + change, of_checkpoint)


def residuals(frames: Sequence[Frame], table: np.ndarray) -> np.ndarray:
    """What the references leave of the energies, eV per atom."""
    return np.array([(frame.energy - reference_energy(table, frame.atoms)) / len(frame.atoms) for frame in frames])
