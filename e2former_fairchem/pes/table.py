"""The outcome of all checks as a Markdown table: whole in the report's folder, brief on screen."""

from __future__ import annotations

from collections.abc import Sequence

from e2former_fairchem.pes.result import VERDICTS
from e2former_fairchem.pes.run import Outcomes, summarize

HEAD = ("check", "system", "quantity", "value", "unit", "limit", "verdict")


def number(value: float | None) -> str:
    """Three significant digits; an em dash for nothing."""
    if value is None:
        return "—"
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:.3g}"


def rows(outcomes: Outcomes, brief: bool = False) -> list[tuple[str, ...]]:
    """One row for each metric; a system that was skipped or that raised has one row that says why.

    Args:
        outcomes: of a run.
        brief: of the metrics that pass or have no limit only the first of each system.
    """
    found = []
    for check, systems in outcomes.items():
        for system, outcome in systems.items():
            if outcome.error is not None:
                found.append((check, system, outcome.error, "—", "", "—", "error"))
            elif outcome.skipped is not None:
                found.append((check, system, outcome.skipped, "—", "", "—", "skipped"))
            else:
                found += [
                    (check, system, m.name, number(m.value), m.unit, number(m.threshold), m.verdict)
                    for k, m in enumerate(outcome.metrics)
                    if not brief or k == 0 or m.verdict not in ("pass", "info")
                ]
    return found


def _cell(text: str) -> str:
    """Text that stays in one cell."""
    return " ".join(text.replace("|", "\\|").split())


def render(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [HEAD, *([_cell(text) for text in line] for line in lines)]
    widths = [max(3, *(len(line[k]) for line in cells)) for k in range(len(HEAD))]
    right = {HEAD.index("value"), HEAD.index("limit")}

    def row(line: Sequence[str]) -> str:
        padded = (t.rjust(w) if k in right else t.ljust(w) for k, (t, w) in enumerate(zip(line, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if k in right else "-") for k, w in enumerate(widths)) + "|"
    return "\n".join([row(cells[0]), rule, *(row(line) for line in cells[1:])])


def notes(outcomes: Outcomes) -> list[str]:
    """What the checks want to say besides numbers."""
    return [
        f"{check} {system}: {note}"
        for check, systems in outcomes.items()
        for system, outcome in systems.items()
        for note in outcome.notes
    ]


def totals(outcomes: Outcomes) -> str:
    """How many checks have which verdict, e.g. `4 of 6 checks pass, 2 fail (bond_scan, reflection)`."""
    verdicts = summarize(outcomes)
    good = sum(verdict in ("pass", "info") for verdict in verdicts.values())
    words = [f"{good} of {len(verdicts)} checks pass"]
    for verdict in VERDICTS:
        names = [check for check, found in verdicts.items() if found == verdict]
        if names and verdict not in ("pass", "info"):
            words.append(f"{verdict}: {', '.join(names)}")
    return "; ".join(words)
