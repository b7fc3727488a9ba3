"""Checks of a data set's folder before anything heavy starts."""

from __future__ import annotations

import glob
import zipfile
from pathlib import Path

import lmdb
import numpy as np

#: Endings of files that ASE's database module opens.
DATABASE_SUFFIXES = (".aselmdb", ".db", ".json")


def _count_lmdb(database: Path) -> int:
    """Structures of an .aselmdb file, from its own counters; ASE would make a list of them."""
    from ase_db_backends.aselmdb import decode_bytestream

    with lmdb.open(str(database), subdir=False, readonly=True, lock=False) as env:
        # Reading beyond the end of a torn file would end the process without a word (SIGBUS).
        whole = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = database.stat().st_size
        if size < whole:
            raise ValueError(f"the file is torn: {size:,} of at least {whole:,} bytes")
        with env.begin() as transaction:
            entries = [transaction.get(key) for key in (b"nextid", b"deleted_ids")]
    nextid, deleted = (None if e is None else decode_bytestream(e, decompress=True, json_decode=True) for e in entries)
    return (nextid or 1) - 1 - len(deleted or ())


def _count(key: str, database: Path) -> int:
    """Structures of a database file.

    Args:
        key: config key, for messages.
        database: the file.

    Raises:
        ValueError: it is none.
    """
    from ase.db import connect

    try:
        if database.stat().st_size == 0:  # SQLite would make a database of it
            raise ValueError("the file is empty")
        if database.suffix == ".aselmdb":
            return _count_lmdb(database)
        with connect(str(database)) as db:
            return db.count()
    except Exception as err:  # lmdb, sqlite3, zlib, json and ASE each have their own
        known = database.suffix in DATABASE_SUFFIXES
        hint = "" if known else "; e2former_fairchem.data.make_sample.write_folder makes one of ASE structures"
        raise ValueError(
            f"{key}: expected an ASE database ({', '.join(DATABASE_SUFFIXES)}) in {database}, got something else "
            f"({type(err).__name__}: {err}){hint}"
        ) from err


def _natoms_length(key: str, metadata: Path) -> int:
    """Length of natoms in metadata.npz, read off its header: OMol25's has a hundred million entries."""
    try:
        with zipfile.ZipFile(metadata) as archive:
            if "natoms.npy" not in archive.namelist():
                raise ValueError(f"{key}: expected the field 'natoms' in {metadata}, got none")
            with archive.open("natoms.npy") as handle:
                version = np.lib.format.read_magic(handle)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                return read(handle)[0][0]
    except (zipfile.BadZipFile, EOFError) as err:
        raise ValueError(f"{key}: expected NumPy's .npz format in {metadata}, got something else ({err})") from err


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
    return sum(_count("data", database) for database in _databases(path))


def check_dataset(key: str, path: str) -> str:
    """Check that `path` is what fairchem's `ase_db` data set can read, and that it is not empty.

    Args:
        key: config key that holds the path, for the message.
        path: a database file, a folder of them, or a glob pattern.

    Returns:
        The path, absolute.

    Raises:
        FileNotFoundError: nothing is there, or a folder without any database.
        ValueError: a file is torn or no database, there is not a single structure, or metadata.npz disagrees.
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
    # fairchem looks for none beside a pattern, and counts the atoms of every row then.
    described = _natoms_length(key, metadata) if metadata.is_file() and not glob.has_magic(path) else None
    size = 0 if described == 0 else sum(_count(key, database) for database in databases)
    if size == 0:
        where = metadata if described == 0 else given
        raise ValueError(f"{key}: expected a data set with at least one structure, got none in {where}")
    if described is not None and described != size:
        raise ValueError(
            f"{key}: expected one entry per structure in {metadata}, got {described:,} for the {size:,} of {given}"
        )
    return str(given.absolute())
