"""The files of a run: `md.jsonl`, `trajectory.extxyz`, and `restart.npz`, from which a killed run goes on.

The restart file is written whole or not at all, and says how long the other two were. Whoever goes on cuts them to that
length and does the steps since then again: no line and no frame is lost or there twice.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.io.extxyz import write_extxyz

from e2former_fairchem.files import replacing
from e2former_fairchem.md.engine import Observables

LOG = "md.jsonl"
TRAJECTORY = "trajectory.extxyz"
RESTART = "restart.npz"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Have the folder of a run alone: whoever goes on cuts files, which another process must not be writing.

    Raises:
        BlockingIOError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise BlockingIOError(f"{folder}: expected a folder of its own, got one where another run writes") from err
        except OSError as err:  # some network file systems have no locks
            logging.warning("%s: cannot be locked (%s); see to it that no other run uses it", folder, err)
        yield
    finally:
        os.close(handle)


def read_restart(folder: Path, facts: Mapping[str, Any], key: str) -> tuple[int, dict[str, np.ndarray]] | None:
    """Steps done and the engine's state, of a run that the folder holds; None where it holds none.

    Args:
        folder: of the run.
        facts: what decides the trajectory, as JSON.
        key: config key of the folder, for messages.

    Raises:
        ValueError: the folder holds another run, or a damaged file.
    """
    path = folder / RESTART
    if not path.is_file():
        return None
    try:
        with np.load(path) as found:
            state = {name: found[name] for name in found.files}
        header = json.loads(str(state.pop("header")))
    except (ValueError, KeyError, OSError, EOFError) as err:
        raise ValueError(f"{path}: expected the restart file of a run, got {type(err).__name__}: {err}") from err
    for name in {**facts, **header["facts"]}:
        there, given = header["facts"].get(name), facts.get(name)
        if there != given:
            raise ValueError(
                f"{name}: expected {there!r}, of the run in {folder}, got {given!r}; go on with that one, or name "
                f"another folder: {key}=FOLDER"
            )
    for name, size in header["sizes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < size:
            raise ValueError(
                f"{folder / name}: expected at least {size} bytes, as {RESTART} says, got fewer or no file"
            )
        with (folder / name).open("r+b") as handle:
            handle.truncate(size)
    return header["steps"], state


class Record:
    """Writes the files of a run.

    Args:
        folder: of the run.
        facts: what decides the trajectory, as JSON.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts = dict(facts)
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("ab") for name in (LOG, TRAJECTORY)}

    def log(self, step: int, time: float, seen: Observables, speed: float | None) -> None:
        """A line of numbers; time: ps, speed: ns/day since the line before."""
        line = {"step": step, "time": time, **asdict(seen), "ns_per_day": speed}
        self._files[LOG].write(json.dumps(line).encode() + b"\n")
        self._files[LOG].flush()

    def save(self, step: int, time: float, frame: Atoms) -> None:
        """A frame; time: ps."""
        atoms = frame.copy()
        atoms.calc = frame.calc
        atoms.info |= {"step": step, "time": time}
        text = io.StringIO()
        write_extxyz(text, [atoms])
        self._files[TRAJECTORY].write(text.getvalue().encode())

    def mark(self, steps: int, state: Mapping[str, np.ndarray]) -> None:
        """Make this the place from which a killed run goes on."""
        for file in self._files.values():
            file.flush()
        header = {
            "steps": steps,
            "facts": self.facts,
            "sizes": {name: (self.folder / name).stat().st_size for name in self._files},
        }
        with replacing(self.folder / RESTART) as handle:
            np.savez(handle, header=json.dumps(header), **state)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def read_log(folder: Path) -> dict[str, np.ndarray]:
    """The columns of `md.jsonl`; NaN where a line has no number."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return {key: np.array([line[key] for line in lines], dtype=float) for key in lines[0]}
