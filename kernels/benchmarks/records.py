"""Where results go: printed as they come, and written with machine, commit and command after every row."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def machine() -> dict:
    """Where a result comes from: device, versions, commit, day."""
    command = ["git", "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    import triton

    found = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("E2FORMER_COMMIT") or commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        found["gpu_GiB"] = round(torch.cuda.get_device_properties(0).total_memory / (1 << 30), 1)
    return found


def save(name: str, rows: dict, folder: str | None = None) -> Path:
    """Write ``rows`` with the machine and the command beside them to ``results/name.json``."""
    path = Path(folder or HERE / "results")
    path.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"kernels/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    file = path / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), "command": command, "rows": rows}, indent=1) + "\n")
    return file


class Results(dict):
    """Rows by name. Each is printed and written as soon as it is there: a run that is cut off keeps what it has."""

    def __init__(self, name: str, folder: str | None = None) -> None:
        super().__init__()
        self.name, self.folder, self.file = name, folder, None

    def add(self, name: str, row: dict) -> dict:
        """Keep, print and write a row; returns it."""
        self[name] = row
        print(f"{name:<44} {text_of(row)}", flush=True)
        self.file = save(self.name, self, self.folder)
        return row


def text_of(row: dict) -> str:
    """A row in one line: times in ms, memory in GiB, the rest as it is."""
    if "error" in row:
        return row["error"]
    parts = []
    for key, value in row.items():
        if key in ("min_ms", "repeats", "warmup_s", "total_GiB"):
            continue
        if isinstance(value, float):
            value = f"{value:.4g}" if math.isfinite(value) else str(value)
        parts.append(f"{key} {value}")
    return ", ".join(parts)


def table(rows: dict[str, dict], columns: tuple[str, ...]) -> str:
    """Rows as an aligned table of the columns named; rows without any of them are left out."""
    lines = []
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, row["error"]])
        elif any(c in row for c in columns):
            cells = [row.get(c) for c in columns]
            lines.append([name, *("-" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)])
    wide = max((len(line[0]) for line in lines), default=0)
    head = f"{'':<{wide}} " + " ".join(f"{c:>12}" for c in columns)
    return "\n".join([head, *(f"{n:<{wide}} " + " ".join(f"{c:>12}" for c in rest) for n, *rest in lines)])


def common_arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """Options of every table."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--precision", default="high", choices=("highest", "high"), help="strict float32, or TF32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a few channels: a test of the benchmark, no benchmark")
    parser.add_argument("--no-gate", action="store_true", help="no check before the timings")
    parser.add_argument("--output", help="folder of the JSON file (default: kernels/benchmarks/results)")
    parser.add_argument("--name", default=name, help="of the JSON file")
    return parser
