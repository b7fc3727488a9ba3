"""What a result was made from: checkpoint, data, settings, versions and machine, as JSON beside it."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from e2former_fairchem.files import sha256_of, write_json

PACKAGES = (
    "e2former-fairchem",
    "fairchem-core",
    "fairchem-data-omol",
    "torch",
    "triton",
    "numpy",
    "ase",
    "e3nn",
    "vesin",
    "pymatgen",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Versions and machine of this process; without names of hosts and users, because results are published."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "fairchem_reports_commit": commit,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cuda": torch.version.cuda if device == "cuda" else None,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_provenance(
    result: Path, fingerprint: Mapping[str, Any], workers: Sequence[Mapping[str, Any]], **facts: Any
) -> Path:
    """Write `<result>.provenance.json`.

    Args:
        result: the finished file.
        fingerprint: what the results depend on: checkpoint, data, settings.
        workers: `environment` of each worker that took part.
        facts: counts, scores and the like.
    """
    target = result.with_name(f"{result.name}.provenance.json")
    content = {
        "file": result.name,
        "file_sha256": sha256_of(result),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **fingerprint,
        **facts,
        "workers": list(workers),
    }
    write_json(target, content)
    return target
