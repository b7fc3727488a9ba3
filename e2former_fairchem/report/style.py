"""What all figures share: type, colours and axes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

WIDTH = 7.2  # inches: two columns of a journal
DPI = 200
#: Okabe and Ito's colours, told apart by colour-blind readers; one for each validation set.
SETS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
#: Of the training's own curves, which belong to no set.
TOTAL, ENERGY, FORCES = "#333333", "#7B3294", "#018571"
GREY = "#8A8A8A"

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: figures look the same everywhere
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def style() -> AbstractContextManager:
    """matplotlib's settings for the time of a `with`; the caller's own come back after it."""
    return mpl.rc_context(RC)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure without pyplot's global state; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def color_of(i: int) -> str:
    """Colour of the i-th set."""
    return SETS[i % len(SETS)]


def legend_of_sets(figure: Figure, labels: Sequence[str], zero_forces: bool = False) -> None:
    """One legend above all panels: colours of the sets, and of the line of zero forces; none for a single set."""
    if len(labels) < 2 and not zero_forces:
        return
    handles = [Patch(color=color_of(i), label=label) for i, label in enumerate(labels)]
    if zero_forces:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="zero forces"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), handlelength=1.4)


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:,.12g}" if abs(value) >= 10_000 else f"{value:.12g}".replace("-", "−")


def log_ticks(axes: Axes, which: str = "y", minor: bool = True) -> None:
    """Plain numbers on a logarithmic axis: 0.1, 1, 10, and 2 and 5 between them where there is room."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = sorted(axes.get_ylim() if which == "y" else axes.get_xlim())
    narrow = low > 0 and high / low < 120
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=12))
    axis.set_minor_locator(LogLocator(subs="auto", numticks=12) if minor else NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def from_zero_or_log(axes: Axes, values: NDArray) -> None:
    """An axis of positive values: from zero, or logarithmic where they differ so much that small ones would vanish."""
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 15 * values.min():
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 2, values.max() * 2)
        log_ticks(axes)
    else:
        axes.set_ylim(0, 1.14 * values.max(initial=1e-9))
