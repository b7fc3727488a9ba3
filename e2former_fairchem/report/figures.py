"""Figures of the errors on the validation sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ase.data import chemical_symbols
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from e2former_fairchem.report import style
from e2former_fairchem.report.errors import ELEMENT_SUMS, ENERGY_SUMS, FORCE_SUMS, GROUP_SUMS, SetErrors
from e2former_fairchem.report.groups import binned, has_energy, has_forces, marginal, size_bins
from e2former_fairchem.report.sample import EDGES
from e2former_fairchem.report.text import short_names, wordy

#: More points than this are shown as a density.
MANY = 4000
_ELEMENTS_A_ROW = 30


def _statistics(errors: SetErrors, energy: bool) -> list[str]:
    names, sums = (ENERGY_SUMS, errors.energy) if energy else (FORCE_SUMS, errors.forces)
    total = dict(zip(names, sums, strict=True))
    count = total["count"]
    mean = total["reference"] / count
    variance = total["reference_square"] / count - mean**2
    unit = "meV/atom" if energy else "meV/Å"
    lines = [
        f"MAE {wordy(1000 * total['abs'] / count)} {unit}",
        f"RMSE {wordy(1000 * np.sqrt(total['square'] / count))} {unit}",
    ]
    if variance > 0:
        lines.append(f"R² {1 - total['square'] / count / variance:.4f}")
    lines.append(f"{int(count):,} {'structures' if energy else 'components'}")
    return lines


def _density_map(color: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("density", ["#E4EDF3", color, "#0B1B26"])


def _cloud(axes: Axes, x: NDArray, y: NDArray, color: str, extent: tuple, what: str | None) -> None:
    """Points, or the logarithm of their density where there are many; `what` is counted, None for no scale."""
    if len(x) <= MANY:
        axes.scatter(x, y, s=7 if len(x) < 1000 else 4, color=color, alpha=0.55, linewidths=0)
        return
    bins = (140, 140) if what else (140, 46)
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=bins, range=(extent[:2], extent[2:]))
    shown = np.ma.masked_equal(counts.T, 0)
    norm = LogNorm(1, max(counts.max(), 10))
    mesh = axes.pcolormesh(x_edges, y_edges, shown, cmap=_density_map(color), norm=norm, rasterized=True)
    if what:
        bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((0.54, 0.14, 0.40, 0.025)), orientation="horizontal")
        bar.set_label(f"{what} in a cell", fontsize=7, labelpad=1)
        bar.ax.tick_params(labelsize=6.5, pad=1)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)


def parity(errors: SetErrors, color: str) -> Figure | None:
    """Predictions against references, and the errors below; None where nothing was compared."""
    panels = []
    if has_energy(errors):
        panels.append((True, errors.energy_sample.rows.astype(float)))
    if has_forces(errors):
        panels.append((False, errors.force_sample.rows.astype(float)))
    if not panels:
        return None
    figure = style.new_figure(4.6, style.WIDTH * (1 if len(panels) == 2 else 0.55))
    grid = figure.subplots(2, len(panels), height_ratios=(3.2, 1), squeeze=False)
    for (upper, lower), (energy, points) in zip(grid.T, panels, strict=True):
        x, y = points.T
        # few extreme labels among many must not shrink all others to a dot
        low, high = np.quantile(x, [0.0005, 0.9995]) if len(x) > MANY else (x.min(), x.max())
        margin = max(0.07 * (high - low), 1e-3)
        low, high = low - margin, high + margin
        outside = int(((np.minimum(x, y) < low) | (np.maximum(x, y) > high)).sum())
        upper.plot([low, high], [low, high], color=style.GREY, linewidth=0.8, zorder=0.5)
        _cloud(upper, x, y, color, (low, high, low, high), "structures" if energy else "components")
        upper.set(xlim=(low, high), ylim=(low, high))
        upper.set_box_aspect(1)
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10])
        for axis in (upper.xaxis, upper.yaxis, lower.xaxis):
            axis.set_major_locator(ticks)
        upper.tick_params(labelbottom=False)
        unit = "eV/atom" if energy else "eV/Å"
        what = "energy" if energy else "force component"
        upper.set_ylabel(f"predicted {what} ({unit})")
        lines = _statistics(errors, energy)
        if outside:
            lines.append(f"{outside:,} of {len(x):,} points outside")
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
        upper.text(
            0.03, 0.97, "\n".join(lines), transform=upper.transAxes, va="top", linespacing=1.4, fontsize=7.5, bbox=box
        )
        error = 1000 * (y - x)
        reach = max(1.15 * float(np.quantile(np.abs(error), 0.999)), 1e-3)
        lower.axhline(0, color=style.GREY, linewidth=0.8, zorder=0.5)
        _cloud(lower, x, error, color, (low, high, -reach, reach), None)
        lower.set(xlim=(low, high), ylim=(-reach, reach))
        lower.set_xlabel(f"reference {what} ({unit})")
        lower.set_ylabel(f"error ({'meV/atom' if energy else 'meV/Å'})")
    return figure


def distributions(sets: Sequence[SetErrors]) -> Figure | None:
    """Share of structures and of force components whose absolute error is below a value."""
    panels = []
    if any(map(has_energy, sets)):
        panels.append(("energy_histogram", "|energy error| (meV/atom)", "share of structures"))
    if any(map(has_forces, sets)):
        panels.append(("force_histogram", "|force error| (meV/Å)", "share of force components"))
    if not panels:
        return None
    figure = style.new_figure(2.7)
    for axes, (name, x_label, y_label) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        low, high = np.inf, 0.0
        for i, (errors, label) in enumerate(zip(sets, short_names([s.name for s in sets]), strict=True)):
            counts = getattr(errors, name)
            if not counts.sum():
                continue
            share = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
            axes.plot(1000 * EDGES, 100 * share, color=style.color_of(i), label=label)
            low = min(low, EDGES[np.searchsorted(share, 0.01)])
            high = max(high, EDGES[min(np.searchsorted(share, 0.9999), len(EDGES) - 1)])
        axes.set_xscale("log")
        axes.set(xlim=(500 * low, 1500 * high), ylim=(0, 101), xlabel=x_label, ylabel=f"{y_label} (%)")
        style.log_ticks(axes, "x")
    style.legend_of_sets(figure, short_names([s.name for s in sets]))
    return figure


def by_element(sets: Sequence[SetErrors]) -> Figure | None:
    """Force error and number of atoms of each element."""
    atoms = np.array([s.elements[:, ELEMENT_SUMS.index("atoms")] for s in sets])
    present = np.flatnonzero(atoms.sum(0))
    if len(present) == 0:
        return None
    rows = [present[i : i + _ELEMENTS_A_ROW] for i in range(0, len(present), _ELEMENTS_A_ROW)]
    figure = style.new_figure(0.3 + 2.7 * len(rows))
    grid = figure.subplots(2 * len(rows), 1, height_ratios=[2.2, 1] * len(rows), squeeze=False)[:, 0]
    names = short_names([s.name for s in sets])
    shown = [np.empty(0)]
    for row, elements in enumerate(rows):
        upper, lower = grid[2 * row], grid[2 * row + 1]
        place = np.arange(len(elements))
        width = 0.8 / len(sets)
        for i, errors in enumerate(sets):
            table = dict(zip(ELEMENT_SUMS, errors.elements[elements].T, strict=True))
            shift = place + (i - (len(sets) - 1) / 2) * width
            mae = np.where(table["count"] > 0, 1000 * table["abs"] / np.maximum(table["count"], 1), np.nan)
            upper.bar(shift, mae, width * 0.92, color=style.color_of(i), label=names[i])
            lower.bar(
                shift, np.where(table["atoms"] > 0, table["atoms"], np.nan), width * 0.92, color=style.color_of(i)
            )
            shown.append(mae)
        for axes in (upper, lower):
            axes.set_xlim(-0.6, max(len(rows[0]), 8) - 0.4)
            axes.grid(axis="x", visible=False)
            axes.tick_params(axis="x", length=0)
        upper.set_xticks(place, [])
        lower.set_xticks(place, [chemical_symbols[z] for z in elements])
        upper.set_ylabel("force MAE (meV/Å)")
        lower.set_yscale("log")
        lower.set_ylim(0.7, 3 * atoms.max())
        lower.set_ylabel("atoms")
        style.log_ticks(lower, minor=False)
    for upper in grid[::2]:
        style.from_zero_or_log(upper, np.concatenate(shown))
    style.legend_of_sets(figure, short_names([s.name for s in sets]))
    return figure


def _grouped(axes: Axes, groups: Sequence[Mapping[int, NDArray]], energy: bool, names: Sequence[str]) -> NDArray:
    """Bars of the mean absolute error by a whole number, grouped by set, with the number of structures on each.

    Returns:
        The heights, for an axis that several panels share.
    """
    keys = sorted({key for group in groups for key in group})
    width = 0.8 / len(groups)
    crowded = len(keys) * len(groups) > 18
    count, total = ("energy_count", "energy_abs") if energy else ("force_count", "force_abs")
    shown = []
    for i, group in enumerate(groups):
        place = np.arange(len(keys)) + (i - (len(groups) - 1) / 2) * width
        rows = [dict(zip(GROUP_SUMS, group[key], strict=True)) if key in group else None for key in keys]
        heights = [1000 * row[total] / row[count] if row and row[count] else np.nan for row in rows]
        shown += heights
        axes.bar(place, heights, width * 0.92, color=style.color_of(i), label=names[i])
        for x, height, row in zip(place, heights, rows, strict=True):
            if row and not crowded and np.isfinite(height):
                label = f"{int(row['structures']):,}"
                axes.annotate(
                    label, (x, height), (0, 1.5), textcoords="offset points", ha="center", fontsize=6.5, color="#555"
                )
    axes.set_xticks(np.arange(len(keys)), [str(key).replace("-", "−") for key in keys])
    axes.set_xlim(-0.7, max(len(keys), 3) - 0.3)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    return np.array(shown, float)


def by_state(sets: Sequence[SetErrors]) -> Figure | None:
    """Errors by total charge and by spin multiplicity; None where nothing was compared."""
    rows = [kind for kind, test in ((True, has_energy), (False, has_forces)) if any(map(test, sets))]
    if not rows:
        return None
    names = short_names([s.name for s in sets])
    figure = style.new_figure(0.35 + 2.0 * len(rows))
    grid = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
    for line, energy in zip(grid, rows, strict=True):
        heights = []
        for column, (axes, label) in enumerate(zip(line, ("total charge (e)", "spin multiplicity 2S+1"), strict=True)):
            heights.append(_grouped(axes, [marginal(s.states, column) for s in sets], energy, names))
            axes.set_xlabel(label if energy == rows[-1] else "")
        style.from_zero_or_log(line[0], np.concatenate(heights))
        line[0].set_ylabel("energy MAE (meV/atom)" if energy else "force MAE (meV/Å)")
    style.legend_of_sets(figure, short_names([s.name for s in sets]))
    return figure


def by_size(sets: Sequence[SetErrors]) -> Figure | None:
    """Errors against the number of atoms; None where all structures are of one size."""
    bins = size_bins(sets)
    rows = [kind for kind, test in ((True, has_energy), (False, has_forces)) if any(map(test, sets))]
    if len(bins) < 2 or not rows:
        return None
    centres = np.array([np.sqrt(a * b) for a, b in bins])
    figure = style.new_figure(2.6)
    value: Callable[[NDArray, str], NDArray] = lambda table, name: table[:, GROUP_SUMS.index(name)]  # noqa: E731
    for axes, energy in zip(np.atleast_1d(figure.subplots(1, len(rows))), rows, strict=True):
        count, total = ("energy_count", "energy_abs") if energy else ("force_count", "force_abs")
        shown = [np.empty(0)]
        for i, (errors, label) in enumerate(zip(sets, short_names([s.name for s in sets]), strict=True)):
            table = np.array(binned(errors, bins))
            there = value(table, count) > 0
            mae = 1000 * value(table, total)[there] / value(table, count)[there]
            axes.plot(centres[there], mae, color=style.color_of(i), marker="o", markersize=3, linewidth=1, label=label)
            shown.append(mae)
        if bins[-1][1] > 8 * bins[0][0]:
            axes.set_xscale("log")
            style.log_ticks(axes, "x")
        style.from_zero_or_log(axes, np.concatenate(shown))
        axes.set_xlabel("atoms in the structure")
        axes.set_ylabel("energy MAE (meV/atom)" if energy else "force MAE (meV/Å)")
    style.legend_of_sets(figure, short_names([s.name for s in sets]))
    return figure
