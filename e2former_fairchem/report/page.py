"""One HTML page with everything: images inside it, no script, nothing from the net; made to be read and printed."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.figure import Figure

from e2former_fairchem.report import curves, figures, style, tables
from e2former_fairchem.report.errors import SetErrors
from e2former_fairchem.report.groups import has_energy, has_forces
from e2former_fairchem.report.text import short_names, wordy

STYLE = """
:root { --ink: #1f2328; --soft: #5c6570; --line: #dfe3e8; --accent: #0072B2; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: #fff; max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 22px 0 6px; }
p { margin: 8px 0; }
.sub { color: var(--soft); margin: 0 0 20px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.card { flex: 1 1 200px; border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  border-left: 4px solid var(--accent); }
.card b { display: block; font-size: 20px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
figure { margin: 14px 0 6px; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figure.narrow img { width: 62%; margin: 0 auto; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.5; margin-top: 6px; }
figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 10px 0; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: right; vertical-align: bottom; border-bottom: 1.5px solid var(--ink);
  padding: 4px 8px; line-height: 1.3; white-space: nowrap; }
td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.word, td.word { text-align: left; }
th.group { border: 0; padding-bottom: 0; }
th.group span { display: block; text-align: center; border-bottom: 1px solid var(--ink); margin-left: 16px; }
.wrap td.word { overflow-wrap: anywhere; white-space: normal; min-width: 8em; }
th:first-child, td:first-child { padding-left: 0; }
tr:last-child td { border-bottom: 1px solid var(--ink); }
table.facts td:first-child { color: var(--soft); white-space: nowrap; vertical-align: top; }
.warning { border-left: 4px solid #D55E00; padding: 6px 12px; background: #fdf3ec; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); font-size: 13px; }
pre { font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: #f6f8fa;
  padding: 12px 14px; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 48px; color: var(--soft); font-size: 12px; }
@media print {
  @page { margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 24px; }
  table { font-size: 8.5pt; } td, th { padding: 2px 6px; }
  tr, .card { break-inside: avoid; }
  .scroll { overflow: visible; }
  pre { font-size: 7.5pt; }
}
"""


@dataclass
class Section:
    """A heading with paragraphs of HTML, in which `{figure:NAME}` stands for a figure."""

    title: str
    parts: list[str] = field(default_factory=list)


def _table(table: tables.Table, css: str = "") -> str:
    def cell(tag: str, i: int, text: str) -> str:
        kind = ' class="word"' if i < table.left else ""
        # headers are ours and may break lines; cells hold names of other people's data
        return f"<{tag}{kind}>{text if tag == 'th' else escape(text)}</{tag}>"

    head = "".join(cell("th", i, text) for i, text in enumerate(table.header))
    spans = "".join(
        f'<th class="group" colspan="{n}">{f"<span>{escape(text)}</span>" if text else ""}</th>'
        for text, n in table.groups
    )
    spans = f"<tr>{spans}</tr>" if spans else ""
    head = f"<thead>{spans}<tr>{head}</tr></thead>" if table.header else ""
    body = "".join("<tr>" + "".join(cell("td", i, t) for i, t in enumerate(row)) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table class="{css}">{head}<tbody>{body}</tbody></table></div>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _figure(name: str, image: bytes, caption: str, number: int) -> str:
    data = base64.b64encode(image).decode()
    words = escape(re.sub("<[^>]*>", "", caption))
    return (
        f'<figure id="{name}"><img alt="{words}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>Figure {number}.</b> {caption}</figcaption></figure>"
    )


def _sampled(errors: SetErrors) -> str:
    kept, count = len(errors.force_sample.rows), int(errors.forces[0])
    if count <= kept:
        return ""
    return f" Of the {count:,} force components a random sample of {kept:,} is drawn; all count in the numbers."


def _cards(sets: Sequence[SetErrors]) -> str:
    cards = []
    for i, (errors, name) in enumerate(zip(sets, short_names([s.name for s in sets]), strict=True)):
        values = tables.overall(errors)
        words = []
        if values["energy_mae_per_atom"] is not None:
            words.append(f"{wordy(values['energy_mae_per_atom'])} meV/atom")
        if values["force_mae"] is not None:
            words.append(f"{wordy(values['force_mae'])} meV/Å")
        share = values["share_of_zero_forces"]
        note = f"{values['structures']:,} structures" + (f", {100 * share:.1f} % of zero forces" if share else "")
        cards.append(
            f'<div class="card" style="--accent: {style.color_of(i)}"><span>{escape(name)}</span>'
            f"<b>{'<br>'.join(words) or '–'}</b><span>{note}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def contents(
    sets: Sequence[SetErrors], facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[list[Section], dict[str, Figure]]:
    """Sections of the page and the figures in them, by the name of their file."""
    made: dict[str, Figure] = {}
    sections: list[Section] = []

    def add(section: Section, name: str, figure: Figure | None, caption: str) -> None:
        if figure is not None:
            made[name] = figure
            section.parts.append(f"{{figure:{name}}}{caption}")

    zero = {s.name: (tables.overall(s)["zero_force_mae"] or 0.0) / 1000 for s in sets if has_forces(s)}
    names = [s.name for s in sets]
    for record in records:  # a run that did not reach its end has no sets, but its evaluations tell
        zero = (record.get("zero_force_mae") or {}) | zero
        names += [name for name in record.get("metrics", {}) if name not in names]
    with style.style():
        if sets:
            section = Section("Errors", [_cards(sets), _table(tables.overall_table(sets))])
            section.parts.append(
                "<p>MAE and RMSE: mean absolute and root mean square error. Energies (E) per atom, unless total; "
                "forces (F) by component. Zero forces: the mean absolute reference component, the error of predicting "
                "zero. Cosine: of the angle between predicted and reference force, mean over atoms.</p>"
            )
            if broken := sum(s.nonfinite for s in sets):
                section.parts.append(
                    f'<p class="warning">{broken:,} structures have predictions that are not finite. They are left out '
                    "of all numbers and figures here.</p>"
                )
            add(
                section,
                "error_distribution",
                figures.distributions(sets),
                "Share of structures and of force components with an absolute error below a value.",
            )
            sections.append(section)
        if records:
            section = Section("Learning curves")
            add(
                section,
                "learning_curves",
                curves.learning_curves(records, zero, names),
                "Training loss (thin: as recorded; thick: running mean) and errors of the averaged weights on the "
                "validation sets. Dotted: the error of predicting zero forces.",
            )
            add(
                section,
                "training_details",
                curves.training_details(records),
                "Learning rate, gradient norm before clipping, and speed of training on all devices together.",
            )
            sections.append(section)
        if sets:
            _add_errors(sets, facts, add, sections)
    sections.append(Section("Run", [_facts(facts)]))
    return sections, made


def _add_errors(sets: Sequence[SetErrors], facts: Mapping[str, Any], add: Any, sections: list[Section]) -> None:
    short = short_names([s.name for s in sets])
    names = [re.sub(r"[^\w.-]+", "_", name) for name in short]
    if len(set(names)) < len(names):
        names = [f"{i}_{name}" for i, name in enumerate(names)]
    section = Section("Parity")
    for i, (errors, name) in enumerate(zip(sets, short, strict=True)):
        what = (
            "minus the energies of the elements" if errors.referenced else "total, because the task has no references"
        )
        add(
            section,
            f"parity_{names[i]}",
            figures.parity(errors, style.color_of(i)),
            f"<b>{escape(name)}</b>: predicted against reference energies per atom ({what}) and force components; "
            f"below, the errors.{_sampled(errors)}",
        )
    sections.append(section)
    section = Section("By element")
    add(section, "error_by_element", figures.by_element(sets), "Force error and number of atoms of each element.")
    section.parts.append(_details("Table", _table(tables.element_table(sets))))
    sections.append(section)
    section = Section("By charge and spin")
    add(
        section,
        "error_by_charge_and_spin",
        figures.by_state(sets),
        "Errors by total charge and by spin multiplicity (0: not given). Numbers on the bars: structures.",
    )
    section.parts.append(_details("Table", _table(tables.state_table(sets))))
    sections.append(section)
    section = Section("By size")
    add(section, "error_by_size", figures.by_size(sets), "Errors against the number of atoms of a structure.")
    section.parts.append(_details("Table", _table(tables.size_table(sets))))
    sections.append(section)
    section = Section("Largest errors")
    labels = facts.get("structures", {})
    for errors, name in zip(sets, short, strict=True):
        for energy, test, word in ((True, has_energy, "energies"), (False, has_forces, "forces")):
            if test(errors):
                section.parts.append(f"<h3>{escape(name)}, {word}</h3>")
                section.parts.append(_table(tables.worst_table(errors, energy, labels), "wrap"))
    sections.append(section)


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [[str(label), str(value)] for label, value in facts.get("facts", [])]
    html = (
        _table(tables.Table([], rows, left=2), "facts wrap") if rows else "<p>The run was stopped before its end.</p>"
    )
    if facts.get("config"):
        html += _details("Configuration", f"<pre>{escape(facts['config'])}</pre>")
    return html


def render(facts: Mapping[str, Any], sections: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """The page's HTML."""
    number = 0
    body = []
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        for part in section.parts:
            if part.startswith("{figure:"):
                name, caption = part[len("{figure:") :].split("}", 1)
                number += 1
                part = _figure(name, images[name], caption, number)
            body.append(part)
    title = escape(facts.get("title", "Training run"))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="sub">{escape(facts.get("subtitle", ""))}</p>\n'
        + "\n".join(body)
        + f"\n<footer>{escape(facts.get('footer', ''))}</footer>\n</body>\n</html>\n"
    )
