"""Checks of a data set's folder before anything heavy starts."""

from __future__ import annotations

import glob
import zipfile
from pathlib import Path

import numpy as np

#: Endings of files that ASE's database module opens.
DATABASE_SUFFIXES = (".aselmdb", ".db", ".json")


def _count(database: Path) -> int:
    from ase.db import connect

    arguments = {"readonly": True, "use_lock_file": False} if database.suffix == ".aselmdb" else {}
    with connect(str(database), **arguments) as db:
        return db.count()


def _length(metadata: Path, field: str) -> int | None:
    """Length of a field of a .npz file, read off its header: OMol25's has a hundred million entries. None: no field."""
    with zipfile.ZipFile(metadata) as archive:
        if f"{field}.npy" not in archive.namelist():
            return None
        with archive.open(f"{field}.npy") as handle:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(handle)[0][0]


def _databases(path: str) -> list[Path]:
    """The database files of a folder, a pattern or a file's name."""
    given = Path(path).expanduser()
    if given.is_dir():
        return sorted(p for p in given.iterdir() if p.suffix in DATABASE_SUFFIXES)
    if glob.has_magic(path):
        return sorted(Path(p) for p in glob.glob(str(given)) if Path(p).suffix in DATABASE_SUFFIXES)
    return [given] if given.is_file() else []


def count_structures(path: str) -> int:
    """Number of structures of a data set that `check_dataset` accepts."""
    return sum(map(_count, _databases(path)))


def check_dataset(key: str, path: str) -> str:
    """Check that `path` is what fairchem's `ase_db` data set can read, and that it is not empty.

    Args:
        key: config key that holds the path, for the message.
        path: a database file, a folder of them, or a glob pattern.

    Returns:
        The path, absolute.

    Raises:
        FileNotFoundError: nothing is there, or a folder without any database.
        ValueError: there is a database or its metadata, but without a single structure, or they disagree.
    """
    given = Path(path).expanduser()
    databases = _databases(path)
    if given.is_dir():
        what = "a folder with at least one .aselmdb file"
    elif glob.has_magic(path):
        what = "a pattern that matches at least one .aselmdb file"
    else:
        what = "a folder of .aselmdb files, one such file or a pattern"
    if not databases:
        got = "a folder without one" if given.is_dir() else "nothing there"
        raise FileNotFoundError(f"{key}: expected {what}, got {given} ({got})")

    metadata = (given if given.is_dir() else given.parent) / "metadata.npz"
    if metadata.is_file():
        size = _length(metadata, "natoms")
        if size is None:
            raise ValueError(f"{key}: expected the field 'natoms' in {metadata}, got none")
        where = metadata
    else:
        # Without metadata every row would have to be read to count its atoms; one structure is enough to know here.
        size = next((n for n in map(_count, databases) if n), 0)
        where = given
    if size == 0:
        raise ValueError(f"{key}: expected a data set with at least one structure, got none in {where}")
    return str(given.absolute())
