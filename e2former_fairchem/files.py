"""Files that are either there and whole, or not there at all."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes the name `path` only when the block ends without an exception.

    Until then it lies beside `path` under a name of its own (`.name` of what is yielded, for libraries that want one),
    and whatever is at `path` stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # other machines may write here too
    try:
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 under `path`."""
    with replacing(path) as handle:
        handle.write(text.encode())


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON under `path`; a not-a-number in it is an error.

    Raises:
        ValueError: a number that is not finite.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_gzipped_json(path: Path, content: Any) -> None:
    """Write compact gzipped JSON under `path`, the same bytes for the same content.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(content, allow_nan=False)
    with replacing(path) as handle, gzip.GzipFile(filename="", fileobj=handle, mode="wb", mtime=0) as packed:
        packed.write(text.encode())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"expected each key once, got {next(k for k in keys if keys.count(k) > 1)!r} repeated")
    return found


def read_json(path: str | Path) -> Any:
    """Read JSON, gzipped or not, whatever the file is called.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file holds something else, ends early or repeats a key within an object.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return json.loads(data, object_pairs_hook=_unique)
    except (EOFError, OSError, ValueError, zlib.error) as err:
        raise ValueError(f"{path}: expected JSON or gzipped JSON, got {type(err).__name__}: {err}") from err
