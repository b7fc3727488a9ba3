"""Learning curves: losses and validation errors against epochs or steps, and time; the training's other numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from e2former_fairchem.report import style
from e2former_fairchem.report.text import short_names

Records = Sequence[Mapping[str, Any]]


def _kind(records: Records, kind: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def validation_errors(records: Records) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """`energy` (meV/atom) and `forces` (meV/Å) -> set -> (epoch, step, mean absolute error) of every evaluation."""
    found: dict[str, dict[str, list]] = {"energy": {}, "forces": {}}
    for record in _kind(records, "evaluation"):
        for dataset, metrics in record["metrics"].items():
            for name, value in metrics.items():
                task, metric = name.rsplit(",", 1)
                prop = {"per_atom_mae": "energy", "mae": "forces"}.get(metric)
                if prop is None or prop not in task or value is None:
                    continue
                points = found[prop].setdefault(dataset, [])
                points.append((record["epoch"], record["step"], 1000 * value))
    return found


class _Progress:
    """The x axis: epochs, or steps where there are less than two epochs, with time on top."""

    def __init__(self, records: Records) -> None:
        self.by_epoch = max(record["epoch"] for record in records) >= 2
        self.label = "epoch" if self.by_epoch else "step"
        place = np.array([(self.of(r["epoch"], r["step"]), r["seconds"]) for r in records], float)
        place = place[np.argsort(place[:, 0], kind="stable")]
        self._x, first = np.unique(np.concatenate([[0.0], place[:, 0]]), return_index=True)
        self._seconds = np.maximum.accumulate(np.concatenate([[0.0], place[:, 1]])[first])
        last = self._seconds[-1]
        self._unit, name = next(
            (size, name)
            for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
            if last >= 2 * size or size == 1
        )
        self.time_label = f"time ({name})"

    def of(self, epoch: float, step: float) -> float:
        return float(epoch if self.by_epoch else step)

    def dress(self, axes: Axes) -> None:
        """Label the axis, and add the one of time."""
        axes.set_xlabel(self.label)
        axes.set_xlim(0, self._x[-1] * 1.02)
        # interp needs growing times: equal ones are told apart by less than anyone sees
        seconds = (self._seconds + np.arange(len(self._seconds)) * 1e-6 * max(self._seconds[-1], 1e-6)) / self._unit
        slope = seconds[-1] / max(self._x[-1], 1e-12)
        if slope <= 0:
            return

        def forward(x: NDArray) -> NDArray:
            return np.where(x <= self._x[-1], np.interp(x, self._x, seconds), seconds[-1] + (x - self._x[-1]) * slope)

        def backward(t: NDArray) -> NDArray:
            return np.where(t <= seconds[-1], np.interp(t, seconds, self._x), self._x[-1] + (t - seconds[-1]) / slope)

        top = axes.secondary_xaxis("top", functions=(forward, backward))
        top.set_xlabel(self.time_label, color=style.GREY)
        top.tick_params(colors=style.GREY)
        top.spines["top"].set_visible(False)


def _smooth(values: NDArray, weights: NDArray) -> NDArray:
    """Running mean over a fortieth of the curve, less at its ends; values that are not finite stay gaps."""
    finite = np.isfinite(values)
    weights = np.where(finite, weights, 0.0)
    total = np.concatenate([[0], np.cumsum(np.where(finite, values, 0.0) * weights)])
    count = np.concatenate([[0], np.cumsum(weights)])
    place = np.arange(len(values))
    # a curve falls steeply at first: a window of full width there would show what never was
    half = np.minimum(max(1, len(values) // 80), place // 3)
    first, last = place - half, np.minimum(place + half + 1, len(values))
    mean = (total[last] - total[first]) / np.maximum(count[last] - count[first], 1e-12)
    return np.where(finite, mean, np.nan)


def _line(axes: Axes, x: NDArray, y: NDArray, weights: NDArray, color: str, label: str) -> None:
    if len(x) < 40:
        axes.plot(x, y, color=color, label=label, marker=".", markersize=3 if len(x) > 1 else 6)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(x, _smooth(y, weights), color=color, label=label)


def _column(records: Records, *keys: str) -> NDArray:
    def read(record: Mapping[str, Any]) -> float:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return np.nan if value is None else float(value)

    return np.array([read(record) for record in records])


def _middle(progress: _Progress, train: Records) -> NDArray:
    """Where the means of a line belong: in the middle of its steps."""
    end = np.array([progress.of(record["epoch"], record["step"]) for record in train])
    steps = _column(train, "steps")
    rate = end / np.maximum(_column(train, "step"), 1)
    return end - rate * (steps - 1) / 2


def learning_curves(records: Records, zero_forces: Mapping[str, float], sets: Sequence[str]) -> Figure | None:
    """Training losses, and validation errors of energies and forces; None where a run has recorded nothing.

    Args:
        records: of `metrics.jsonl`.
        zero_forces: mean absolute force component of each set, eV/Å; given as dotted lines.
        sets: names of all sets, in the order of their colours.
    """
    train, errors = _kind(records, "train"), validation_errors(records)
    if not records:
        return None
    progress = _Progress(records)
    panels = (["loss"] if train else []) + [prop for prop in ("energy", "forces") if errors[prop]]
    figure = style.new_figure(3.0)
    shown = [name for name in sets if name in errors["energy"] or name in errors["forces"]]
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.set_yscale("log")
        if panel == "loss":
            x, weights = _middle(progress, train), _column(train, "steps")
            tasks = list(train[-1]["losses"])
            if len(tasks) > 1:
                for i, task in enumerate(tasks):
                    color = (
                        style.ENERGY if "energy" in task else style.FORCES if "forces" in task else style.color_of(i)
                    )
                    _line(axes, x, _column(train, "losses", task), weights, color, task.replace("_", " "))
            _line(axes, x, _column(train, "loss"), weights, style.TOTAL, "total")
            axes.set_ylabel("training loss, weighted")
        else:
            for i, name in enumerate(sets):
                points = errors[panel].get(name, [])
                if not points:
                    continue
                x = [progress.of(epoch, step) for epoch, step, _ in points]
                y = [value for *_, value in points]
                axes.plot(x, y, color=style.color_of(i), marker="o" if len(x) <= 30 else None, markersize=3)
                if panel == "forces" and name in zero_forces:
                    axes.axhline(1000 * zero_forces[name], color=style.color_of(i), linestyle=":", linewidth=0.9)
            axes.set_ylabel("energy MAE (meV/atom)" if panel == "energy" else "force MAE (meV/Å)")
        progress.dress(axes)
        style.log_ticks(axes)
        if panel == "loss":
            axes.legend(loc="upper right")
    style.legend_of_sets(figure, short_names(sets) if shown else [], any(name in zero_forces for name in shown))
    return figure


def training_details(records: Records) -> Figure | None:
    """Learning rate, gradient norm and speed; None where a run has recorded nothing."""
    train = _kind(records, "train")
    if not train:
        return None
    progress = _Progress(records)
    x, weights = _middle(progress, train), _column(train, "steps")
    panels = [
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("atoms_per_second", "atoms per second"),
    ]
    panels = [panel for panel in panels if np.isfinite(_column(train, panel[0])).any()]
    figure = style.new_figure(2.3)
    for axes, (key, label) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        values = _column(train, key)
        if key == "lr":
            power = int(np.floor(np.log10(max(np.nanmax(values), 1e-300))))
            axes.plot(x, values / 10.0**power, color=style.TOTAL)
            axes.set_ylim(bottom=0)
            label += f" ($10^{{{power}}}$)"
        else:
            _line(axes, x, values, weights, style.TOTAL, label)
        if key == "grad_norm" and np.nanmin(values) > 0:
            axes.set_yscale("log")
            style.log_ticks(axes)
        elif key == "atoms_per_second":
            axes.set_ylim(0, 1.15 * np.nanpercentile(values, 99))
        axes.set_ylabel(label)
        progress.dress(axes)
    return figure
