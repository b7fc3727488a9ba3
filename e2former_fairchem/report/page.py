"""One HTML page with everything: images inside it, no script, nothing from the net; made to be read and printed."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from e2former_fairchem.report import curves, figures, style, tables
from e2former_fairchem.report.errors import SetErrors
from e2former_fairchem.report.groups import has_energy, has_forces
from e2former_fairchem.report.text import short_names, wordy

Records = Sequence[Mapping[str, Any]]


def parity_names(sets: Sequence[SetErrors]) -> list[str]:
    """Names of the sets' parity figures, which are names of files too."""
    names = [re.sub(r"[^\w.-]+", "_", name) for name in short_names([errors.name for errors in sets])]
    if len(set(names)) < len(names):
        names = [f"{i}_{name}" for i, name in enumerate(names)]
    return [f"parity_{name}" for name in names]


def draw(sets: Sequence[SetErrors], records: Records) -> dict[str, Figure]:
    """The page's figures in their order, by the name of their file.

    Args:
        sets: errors on the validation sets; none for a run that did not reach its end.
        records: of the run's `metrics.jsonl`; none for an evaluation.
    """
    zero = {s.name: (tables.overall(s)["zero_force_mae"] or 0.0) / 1000 for s in sets if has_forces(s)}
    names = [s.name for s in sets]
    for record in records:  # a run that did not reach its end has no sets, but its evaluations tell
        zero = (record.get("zero_force_mae") or {}) | zero
        names += [name for name in record.get("metrics", {}) if name not in names]
    made: dict[str, Figure | None] = {}
    with style.style():
        if sets:
            made["error_distribution"] = figures.distributions(sets)
        made["learning_curves"] = curves.learning_curves(records, zero, names)
        made["training_details"] = curves.training_details(records)
        for i, (name, errors) in enumerate(zip(parity_names(sets), sets, strict=True)):
            made[name] = figures.parity(errors, style.color_of(i))
        if sets:
            made["error_by_element"] = figures.by_element(sets)
            made["error_by_charge_and_spin"] = figures.by_state(sets)
            made["error_by_size"] = figures.by_size(sets)
    return {name: figure for name, figure in made.items() if figure is not None}


def render(sets: Sequence[SetErrors], facts: Mapping[str, Any], records: Records, images: Mapping[str, bytes]) -> str:
    """The page's HTML, from the template `page.html`.

    Args:
        sets: as for `draw`.
        facts: of the run (`facts.gather_facts`); none for a run that did not reach its end.
        records: as for `draw`.
        images: PNG files of `draw`'s figures, in its order.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["wordy"] = wordy
    facts = {"title": "Training run", "subtitle": "", "footer": "", "facts": [], **facts}
    labels = facts.get("structures", {})
    shown = [
        {
            "name": name,
            "color": style.color_of(i),
            "errors": errors,
            "overall": tables.overall(errors),
            "components": int(errors.forces[0]),
            "parity": parity,
            "worst": [
                (word, tables.worst_table(errors, energy, labels))
                for word, energy, test in (("energies", True, has_energy), ("forces", False, has_forces))
                if test(errors)
            ],
        }
        for i, (errors, name, parity) in enumerate(
            zip(sets, short_names([s.name for s in sets]), parity_names(sets), strict=True)
        )
    ]
    return environment.get_template("page.html").render(
        sets=shown,
        facts=facts,
        records=records,
        broken=sum(errors.nonfinite for errors in sets),
        images={
            name: {"number": number, "data": base64.b64encode(image).decode()}
            for number, (name, image) in enumerate(images.items(), 1)
        },
        tables={
            "overall": tables.overall_table(sets),
            "element": tables.element_table(sets),
            "state": tables.state_table(sets),
            "size": tables.size_table(sets),
            "facts": tables.Table([], [list(map(str, row)) for row in facts["facts"]], left=2),
        },
    )
