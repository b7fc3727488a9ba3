"""The report's folder: numbers first, then figures and the page, which can be made again from the numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e2former_fairchem.files import replacing, write_text
from e2former_fairchem.report.errors import SetErrors
from e2former_fairchem.report.tables import overall, summary
from e2former_fairchem.training.metrics import METRICS_FILE, read_metrics

ERRORS, FACTS, SUMMARY, PAGE = "errors.npz", "run.json", "summary.json", "index.html"


def save_numbers(folder: Path, sets: Sequence[SetErrors], facts: Mapping[str, Any]) -> None:
    """Write `errors.npz` and `run.json`, all that figures and page are made from besides the run's metrics file, and
    `summary.json`, the errors for other programs.
    """
    arrays = {"names": np.array([errors.name for errors in sets], np.str_)}
    for i, errors in enumerate(sets):
        arrays |= {f"{i}/{key}": value for key, value in errors.to_arrays().items()}
    with replacing(folder / ERRORS) as handle:
        np.savez_compressed(handle, **arrays)
    write_text(folder / FACTS, json.dumps(dict(facts), indent=1) + "\n")
    write_text(folder / SUMMARY, json.dumps(summary(sets), indent=1) + "\n")


def load_numbers(folder: Path) -> tuple[list[SetErrors], dict[str, Any]]:
    """What `save_numbers` wrote; nothing of it for a run that was stopped before its end.

    Raises:
        ValueError: a file is damaged.
    """
    facts: dict[str, Any] = {}
    sets = []
    if (folder / FACTS).is_file():
        try:
            facts = json.loads((folder / FACTS).read_text())
        except json.JSONDecodeError as err:
            raise ValueError(f"{folder / FACTS}: expected JSON, got {err}") from err
    if (folder / ERRORS).is_file():
        try:
            with np.load(folder / ERRORS, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            for i, name in enumerate(arrays["names"]):
                own = {key.split("/", 1)[1]: value for key, value in arrays.items() if key.startswith(f"{i}/")}
                sets.append(SetErrors.from_arrays(str(name), own))
        except (KeyError, OSError, EOFError, ValueError) as err:
            raise ValueError(f"{folder / ERRORS}: expected the numbers of a report, got {err!r}") from err
    return sets, facts


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Records of the metrics of the run that a report belongs to; none where it is an evaluation's."""
    file = folder.parent / METRICS_FILE
    return read_metrics(file) if file.is_file() else []


def _final(sets: Sequence[SetErrors], facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[dict]:
    """The errors of the report as the learning curve's last point, where training went on after the last evaluation."""
    final = facts.get("final")
    if not final or not records or any(r["kind"] == "evaluation" and r["step"] == final["step"] for r in records):
        return []
    metrics = {}
    for errors in sets:
        values = overall(errors)
        named = {"energy,per_atom_mae": values["energy_mae_per_atom"], "forces,mae": values["force_mae"]}
        metrics[errors.name] = {key: value / 1000 for key, value in named.items() if value is not None}
    last = records[-1]
    return [{"kind": "evaluation", "metrics": metrics, **{key: last[key] for key in ("step", "epoch", "seconds")}}]


def build(folder: Path) -> Path:
    """Make figures and page from the numbers in a report's folder.

    Returns:
        The page.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: the folder has no numbers, and the run no metrics.
        ValueError: a file is damaged.
    """
    from e2former_fairchem.report.page import draw, render

    sets, facts = load_numbers(folder)
    records = read_run(folder)
    if not sets and not records:
        raise FileNotFoundError(f"expected {ERRORS} in {folder} or {METRICS_FILE} beside it, got neither")
    records += _final(sets, facts, records)
    images = {}
    for name, figure in draw(sets, records).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        images[name] = buffer.getvalue()
        with replacing(folder / f"{name}.png") as handle:
            handle.write(images[name])
    for old in folder.glob("*.png"):
        if old.stem not in images:  # of an earlier report in the same folder
            old.unlink()
    write_text(folder / PAGE, render(sets, facts, records, images))
    return folder / PAGE


def find_report(location: Path) -> Path:
    """The report's folder for a report, for a run, or for the newest run in a folder of runs.

    Raises:
        FileNotFoundError: there is none of these.
    """

    def of_run(run: Path) -> Path | None:
        has = (run / METRICS_FILE).is_file() or (run / "report" / ERRORS).is_file()
        return run / "report" if has else None

    if (location / ERRORS).is_file():
        return location
    if found := of_run(location):
        return found
    runs = sorted(path for path in location.glob("*/") if of_run(path)) if location.is_dir() else []
    if not runs:
        raise FileNotFoundError(
            f"expected the folder of a run (with {METRICS_FILE}) or of a report (with {ERRORS}), got {location}"
        )
    return of_run(max(runs, key=lambda run: run.stat().st_mtime))
