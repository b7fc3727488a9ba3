"""The outcome of all checks as one figure of small panels, with units, for a paper's appendix."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from e2former_fairchem.pes.result import Outcome
from e2former_fairchem.pes.run import Outcomes, summarize

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
VERDICT_COLOURS = {"pass": "#009E73", "fail": "#D55E00", "error": "#D55E00"}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "mathtext.default": "regular",
}
TITLES = {
    "nve": "Energy conservation (NVE)",
    "bond_scan": "Bond scans",
    "forces": "Finite-difference forces",
    "extensivity": "Size-extensivity",
    "reflection": "Mirror images, rotations",
    "cutoff": "Crossing the cutoff",
}

Curves = dict[str, dict[str, Any]]


def _verdict_colour(verdict: str) -> str:
    return VERDICT_COLOURS.get(verdict, "0.4")


def formula(name: str) -> str:
    """A system's name with its digits as subscripts where it is a formula."""
    if name.isalnum() and any(c.isupper() for c in name):
        return "".join(f"$_{{{c}}}$" if c.isdigit() else c for c in name)
    return name.replace("_", " ")


def _threshold(axes: Axes, outcomes: dict[str, Outcome], word: str, left: bool = False) -> float | None:
    """A dashed line at the limit of the first metric whose name starts with the word, labelled at one of its ends."""
    for outcome in outcomes.values():
        for metric in outcome.metrics:
            if metric.threshold is not None and metric.name.startswith(word):
                axes.axhline(metric.threshold, color="0.35", lw=0.8, ls=(0, (4, 3)), zorder=0)
                axes.annotate(
                    f"limit {metric.threshold:g}",
                    (0 if left else 1, metric.threshold),
                    xycoords=("axes fraction", "data"),
                    xytext=(2 if left else -1, 2),
                    textcoords="offset points",
                    ha="left" if left else "right",
                    fontsize=6.5,
                    color="0.35",
                )
                return metric.threshold
    return None


def _floored(values: Any, floor: float) -> np.ndarray:
    """For a logarithmic axis: what is smaller lies at its lower end."""
    return np.maximum(np.abs(np.asarray(values, dtype=float)), floor)


def _nve(axes: Axes, curves: Curves, outcomes: dict[str, Outcome]) -> None:
    for (name, c), colour in zip(curves.items(), _cycle(), strict=False):
        time, energy, fit = (np.array(c[key]) for key in ("time", "energy", "fit"))
        kept = time >= c["fit_from"]
        axes.plot(time, energy, color=colour, lw=0.6, alpha=0.75)
        axes.plot(time[kept], fit[kept], color=colour, lw=1.6, label=f"{formula(name)}: {c['drift']:+.2g} meV/atom/ps")
    axes.set(xlabel="time (ps)", ylabel="total energy − mean (meV/atom)")
    axes.margins(y=0.25)
    axes.legend(loc="upper right")


def _bond_label(name: str, bond: str) -> str:
    """The bond's atoms, where the molecule has more than these."""
    return formula(name) if len(name.replace("2", "")) <= 2 else f"{formula(name)}, {bond.replace('-', '–')}"


def _bond_scan(axes: Axes, curves: Curves, outcomes: dict[str, Outcome]) -> None:
    top, deepest = 0.5, 0.0
    for (name, c), colour in zip(curves.items(), _cycle(), strict=False):
        axes.plot(c["distance"], c["energy"], color=colour, label=_bond_label(name, c["bond"]))
        axes.plot(c["extrema"], c["extrema_energy"], "o", ms=4.5, mfc="white", mec=colour, mew=1.1, zorder=3)
        top = max(top, c["energy"][-1], *c["extrema_energy"], 0.0)
    axes.plot([], [], "o", ms=4.5, mfc="white", mec="0.3", label="extra extremum")
    axes.set(xlabel="bond length (Å)", ylabel="energy − minimum (eV)", ylim=(deepest - 0.05 * top, 1.6 * top))
    axes.legend(loc="upper right", ncols=2, columnspacing=1.0, handlelength=1.4)


def _forces(axes: Axes, curves: Curves, outcomes: dict[str, Outcome]) -> None:
    for (name, c), colour in zip(curves.items(), _cycle(), strict=False):
        axes.plot(
            c["force"], _floored(c["difference"], 1e-12), "o", ms=3, color=colour, alpha=0.8, mew=0, label=formula(name)
        )
    axes.set(xlabel="force component (eV/Å)", ylabel="|force − difference| (eV/Å)", yscale="log")
    limit = _threshold(axes, outcomes, "force - finite")
    _headroom(axes, limit)
    axes.legend(loc="upper left", ncols=3, handletextpad=0.1, columnspacing=0.8)


def _extensivity(axes: Axes, curves: Curves, outcomes: dict[str, Outcome]) -> None:
    for (name, c), colour in zip(curves.items(), _cycle(), strict=False):
        axes.plot(c["copies"], _floored(c["deviation"], 1e-10), "o-", ms=4, color=colour, label=formula(name))
    ticks = sorted({n for c in curves.values() for n in c["copies"]})
    axes.set(xlabel="copies or cells n", yscale="log", xscale="log")
    axes.set_ylabel("|E$_n$/n − E$_1$| (meV)")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    limit = _threshold(axes, outcomes, "E_")
    _headroom(axes, limit)
    axes.legend(loc="upper left", ncols=3, handlelength=1.2, columnspacing=0.8)


def _reflection(axes: Axes, curves: Curves, outcomes: dict[str, Outcome]) -> None:
    names = list(curves)
    for place, c in enumerate(curves.values()):
        rotations = _floored(c["rotations"], 1e-9)
        axes.plot(place + np.linspace(-0.12, 0.12, len(rotations)), rotations, "o", ms=3.5, color=COLOURS[0], mew=0)
        axes.plot([place], _floored([c["mirror"]], 1e-9), "D", ms=6, color=COLOURS[1])
    axes.plot([], [], "D", ms=5, color=COLOURS[1], label="mirror image")
    axes.plot([], [], "o", ms=3.5, mew=0, color=COLOURS[0], label="rotated")
    axes.set(ylabel="|energy difference| (meV)", yscale="log", xlim=(-0.6, len(names) - 0.4))
    axes.set_xticks(range(len(names)), [formula(name) for name in names])
    limit = _threshold(axes, outcomes, "energy of the mirror")
    _headroom(axes, limit)
    axes.legend(loc="upper left", ncols=2, handletextpad=0.2, columnspacing=0.8)


def _cutoff(axes: Axes, curves: Curves, outcomes: dict[str, Outcome]) -> None:
    for (name, c), colour in zip(curves.items(), _cycle(), strict=False):
        axes.plot(c["jump_place"], _floored(c["force_jump"], 1e-12), color=colour, lw=1.0, label=formula(name))
        axes.plot(
            c["crossings"],
            np.full(len(c["crossings"]), 0.02),
            "|",
            ms=7,
            mew=1.0,
            color=colour,
            transform=axes.get_xaxis_transform(),
        )
    kinds = {bool(c["molecule"]) for c in curves.values()}
    words = {True: "distance − cutoff", False: "displacement"}
    axes.set(xlabel=f"{' or '.join(words[k] for k in sorted(kinds, reverse=True))} (Å)", yscale="log")
    axes.set_ylabel("force − smooth trend (eV/Å)")
    for c, colour in zip(curves.values(), _cycle(), strict=False):
        axes.plot(c["refined_place"], _floored(c["refined_jump"], 1e-12), "v", ms=5, mfc="white", mec=colour, mew=1.1)
    if any(c["refined_place"] for c in curves.values()):
        axes.plot([], [], "v", ms=5, mfc="white", mec="0.3", label="on a finer grid")
    axes.plot([], [], "|", ms=7, color="0.3", label="pair crosses")
    limit = _threshold(axes, outcomes, "force jump", left=True)
    _headroom(axes, limit)
    tails = [m for outcome in outcomes.values() for m in outcome.metrics if m.name.startswith("force in the last")]
    if tails:
        worst = max(tails, key=lambda metric: metric.value)
        text = f"{worst.name}: {worst.value:.2g} {worst.unit}"
        axes.annotate(text, (0.02, 0.07), xycoords="axes fraction", fontsize=6.5, color=_verdict_colour(worst.verdict))
    axes.legend(loc="upper left", ncols=2, handlelength=1.2, columnspacing=0.8)


PANELS: dict[str, Callable[[Axes, Curves, dict[str, Outcome]], None]] = {
    "nve": _nve,
    "bond_scan": _bond_scan,
    "forces": _forces,
    "extensivity": _extensivity,
    "reflection": _reflection,
    "cutoff": _cutoff,
}


def _cycle() -> list[str]:
    return [*COLOURS] * 20


def _headroom(axes: Axes, limit: float | None) -> None:
    """Room for the legend above the points and the limit of a logarithmic axis."""
    axes.minorticks_off()
    low, high = axes.get_ylim()
    high = max(high, 3 * (limit or high))
    axes.set_ylim(low, high * (high / low) ** 0.25)


def draw(outcomes: Outcomes, title: str, subtitle: str) -> Figure:
    """The figure.

    Args:
        outcomes: of `run.run_checks`.
        title: what was checked.
        subtitle: how, in one line.
    """
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(outcomes))
        lines = -(-len(outcomes) // columns)
        figure = Figure(figsize=(3.35 * columns, 2.7 * lines + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False)
        verdicts = summarize(outcomes)
        for letter, axes, (check, found) in zip("abcdefghij", grid.flat, outcomes.items(), strict=False):
            axes.set_title(f"{letter}  {TITLES[check]}", loc="left", fontweight="bold")
            word = verdicts[check]
            axes.set_title(word, loc="right", fontsize=8, fontweight="bold", color=_verdict_colour(word))
            curves = {name: outcome.curves for name, outcome in found.items() if outcome.curves}
            if curves:
                PANELS[check](axes, curves, found)
            else:
                axes.set_axis_off()
            missing = [f"{name}: {o.error or o.skipped}" for name, o in found.items() if not o.curves]
            if missing:
                text = "\n".join(line if len(line) < 60 else line[:59] + "…" for line in missing[:6])
                axes.annotate(text, (0.03, 0.03), xycoords="axes fraction", fontsize=6, color="0.3", va="bottom")
        for axes in list(grid.flat)[len(outcomes) :]:
            axes.set_axis_off()
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.35")
    return figure


def save(figure: Figure, handle: IO[bytes]) -> None:
    """Write a PNG of 200 dots per inch."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(handle, format="png", dpi=200)
