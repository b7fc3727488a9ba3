"""Files are whole or absent, and what was there stays until the new one is."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from e2former_fairchem.files import read_json, replacing, write_gzipped_json, write_json, write_text


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(KeyError), replacing(tmp_path / "b") as handle:
        handle.write(b"half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    write_text(target, "old")
    with pytest.raises(OSError, match="disk full"), replacing(target) as handle:
        handle.write(b"half")
        handle.flush()
        assert target.read_text() == "old"
        raise OSError("disk full")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_by_handle_or_by_name(tmp_path: Path) -> None:
    """numpy writes to a handle, others want a name; folders are made, permissions are those of any new file."""
    with replacing(tmp_path / "folder" / "arrays.npz") as handle:
        np.savez(handle, x=np.arange(3))
    assert np.load(tmp_path / "folder" / "arrays.npz")["x"].tolist() == [0, 1, 2]
    (tmp_path / "source").write_bytes(b"copied")
    with replacing(tmp_path / "copy") as handle:
        shutil.copyfile(tmp_path / "source", handle.name)
    assert (tmp_path / "copy").read_bytes() == b"copied"
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "text", "Å")
    finally:
        os.umask(before)
    assert (tmp_path / "text").read_bytes() == "Å".encode()
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    """Each writes a file of its own; the last one to end is there, whole."""
    with replacing(tmp_path / "x") as first, replacing(tmp_path / "x") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_json_gzipped_or_not(tmp_path: Path) -> None:
    write_gzipped_json(tmp_path / "a.gz", {"x": [1.5, None]})
    first = (tmp_path / "a.gz").read_bytes()
    write_gzipped_json(tmp_path / "a.gz", {"x": [1.5, None]})
    assert (tmp_path / "a.gz").read_bytes() == first and json.loads(gzip.decompress(first)) == {"x": [1.5, None]}
    assert read_json(tmp_path / "a.gz") == {"x": [1.5, None]}
