"""A journal of results: appended record by record, readable up to the last whole record whenever its writer dies.

A record is `magic | kind | number of indices | payload length | CRC-32 | indices (int64) | payload`, little endian; the
checksum covers everything but itself and the magic. The first record of a file is its header, a JSON object with the
run's fingerprint: results of another checkpoint, data set or setting are never mixed in.

SQLite and LMDB do not keep these promises: neither checks its pages, so that a flipped bit or a tail that was cut off
comes back as other numbers, and neither is made for network file systems, where workers of several machines write.

A file belongs to one worker at a time (an exclusive lock). When its owner opens it, whatever follows the last whole
record is moved to a file of its own beside it, so that nothing is destroyed, and is computed again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from e2former_fairchem.files import replacing

SUFFIX = ".journal"
_MAGIC = b"E2FJ"
_FIXED = struct.Struct("<4sBIQI")
#: Seconds between two fsync calls. A killed process loses nothing; only a machine that loses power can lose this much.
SYNC_EVERY = 10.0


#: Seconds to wait for a journal that is locked: the readers of a killed run notice its death only after a few seconds.
LOCK_WAIT = 20.0


class Kind(IntEnum):
    """What a record holds."""

    HEADER = 0
    RESULT = 1  # structures that are done
    FAILURE = 2  # structures without a result, and why


class JournalError(RuntimeError):
    """A journal that belongs to another run or is in use."""


@dataclass(frozen=True)
class Record:
    """One record: its kind, the indices of the structures it is about, and the payload."""

    kind: Kind
    indices: np.ndarray
    payload: bytes


def _checksum(kind: int, indices: bytes, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(indices, zlib.crc32(bytes([kind]))))


def _read_record(handle: IO[bytes]) -> Record | None:
    """The next record, or None at the end or at the first byte that is no whole record."""
    fixed = handle.read(_FIXED.size)
    if len(fixed) < _FIXED.size:
        return None
    magic, kind, count, length, checksum = _FIXED.unpack(fixed)
    left = os.fstat(handle.fileno()).st_size - handle.tell()
    if magic != _MAGIC or kind not in list(Kind) or 8 * count + length > left:
        return None
    indices, payload = handle.read(8 * count), handle.read(length)
    if _checksum(kind, indices, payload) != checksum:
        return None
    return Record(Kind(kind), np.frombuffer(indices, "<i8"), payload)


def read_records(path: Path) -> Iterator[Record]:
    """The whole records of a journal, the header included, up to the first damaged one."""
    with path.open("rb") as handle:
        while (record := _read_record(handle)) is not None:
            yield record


def journals(folder: Path) -> list[Path]:
    """All journals of a folder, by name."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def read_header(path: Path) -> dict[str, Any] | None:
    """A journal's header, or None where its writer died before it was whole."""
    record = next(read_records(path), None)
    return json.loads(record.payload) if record is not None and record.kind == Kind.HEADER else None


def check_fingerprint(path: Path, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Check that a journal belongs to this run.

    Raises:
        JournalError: names the first keys that differ.
    """
    differing = [k for k in sorted({*expected, *got}) if expected.get(k) != got.get(k)]
    if differing:
        what = "; ".join(f"{k}: expected {expected.get(k)!r}, got {got.get(k)!r}" for k in differing[:3])
        raise JournalError(
            f"{path}: the journal of another run ({what}). Choose another job.run_dir, or remove the folder "
            f"{path.parent} to start again"
        )


def done_indices(paths: Iterable[Path], *, retry_failed: bool = False) -> set[int]:
    """Indices of the structures that need no more work; failed ones count as done unless they are to be retried."""
    done: set[int] = set()
    for path in paths:
        for record in read_records(path):
            if record.kind == Kind.RESULT or (record.kind == Kind.FAILURE and not retry_failed):
                done.update(record.indices.tolist())
    return done


def mentioned(paths: Iterable[Path]) -> int:
    """Number of structures that have a result or a failure; payloads are skipped, so this is quick."""
    found: set[int] = set()
    for path in paths:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            while len(fixed := handle.read(_FIXED.size)) == _FIXED.size:
                magic, _, count, length, _ = _FIXED.unpack(fixed)
                if magic != _MAGIC or handle.tell() + 8 * count + length > size:
                    break
                found.update(np.frombuffer(handle.read(8 * count), "<i8").tolist())
                handle.seek(length, os.SEEK_CUR)
    return len(found)


def _lock(handle: IO[bytes], wait: float) -> bool:
    """Lock a file against other processes, for as long as it is open; False when another has it for `wait` seconds."""
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        except OSError as err:  # some network file systems have no locks
            logging.warning("%s: cannot be locked (%s); see to it that no other run uses it", handle.name, err)
            return True


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """A file, made if it is not there, that one process at a time has; others wait."""
    with path.open("a+b") as handle:
        _lock(handle, float("inf"))
        yield handle


class Journal:
    """The journal that this process appends to. Use as a context manager.

    Args:
        path: the file; made if it is not there.
        fingerprint: what the results depend on; kept in the header and compared with the one that is there.
        about: what else the header tells, such as versions and the machine; not compared.
        wait: for another process that holds the file, s.

    Raises:
        JournalError: another process holds the file, or it belongs to another run.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
        wait: float = LOCK_WAIT,
    ) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("a+b")
        try:
            if not _lock(self._handle, wait):
                raise JournalError(f"{path}: expected no other writer, got one that is still running")
            header = self._repair()
            if header is None:
                self._synced = 0.0
                content = {"fingerprint": dict(fingerprint), "about": dict(about or {})}
                self.append(Kind.HEADER, (), json.dumps(content).encode())
            else:
                check_fingerprint(path, fingerprint, header["fingerprint"])
            self._synced = time.monotonic()
        except BaseException:
            self._handle.close()
            raise

    def _repair(self) -> dict[str, Any] | None:
        """Cut the file after its last whole record; returns the header."""
        header, end = None, 0
        self._handle.seek(0)
        while (record := _read_record(self._handle)) is not None:
            if end == 0:
                if record.kind != Kind.HEADER:
                    break
                header = json.loads(record.payload)
            end = self._handle.tell()
        size = os.fstat(self._handle.fileno()).st_size
        if end < size:
            aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
            self._handle.seek(end)
            with replacing(aside) as kept:
                kept.write(self._handle.read())
            self._handle.truncate(end)
            logging.warning(
                "%s: the last %d of %d bytes are no whole record (a killed or failed write); they are kept in %s, and "
                "their structures are computed again",
                self.path,
                size - end,
                size,
                aside.name,
            )
        return header

    def append(self, kind: Kind, indices: Sequence[int], payload: bytes) -> None:
        """Add a record; it survives this process from the moment that the call returns."""
        rows = np.asarray(indices, "<i8").tobytes()
        fixed = _FIXED.pack(_MAGIC, kind, len(rows) // 8, len(payload), _checksum(kind, rows, payload))
        self._handle.write(fixed + rows + payload)
        self._handle.flush()
        if time.monotonic() - self._synced > SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Wait until everything so far is on the disk."""
        if self._handle.closed:
            return
        os.fsync(self._handle.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, and give the lock back."""
        if not self._handle.closed:
            self.sync()
            self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
