"""The properties that training knows by name: how errors of each are measured and shown. A new one is an entry.

Its labels come by `a2g_args` and `key_mapping` of the groups in `run_files/dataset` (and of `configs/own_data.yaml`),
its loss by a task in `run_files/tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["PROPERTIES", "Property"]


class Property(NamedTuple):
    """One property that heads predict.

    Args:
        metric: which of fairchem's metrics is its error, in eV, Å and atoms.
        factor: what the error is multiplied by in what a card says.
        unit: of that.
        line: its words in a line of training's or an evaluation's progress; None: it is not in there.
        line_factor: what the error is multiplied by for them.
        digits: its format there.
        replayed: whether steps of training with its loss can be padded and replayed (`training.replay`).
    """

    metric: str
    factor: float
    unit: str
    line: str | None = None
    line_factor: float = 1.0
    digits: str = "{:.3f}"
    replayed: bool = False


PROPERTIES: Mapping[str, Property] = {
    "energy": Property("per_atom_mae", 1000.0, "meV/atom", "E {} meV/atom", 1000.0, "{:.1f}", replayed=True),
    "forces": Property("mae", 1000.0, "meV/Å", "F {} eV/Å", replayed=True),
    "stress": Property("mae", 1000.0, "meV/Å^3", replayed=True),
}
