"""Energies, temperature and pressure of a run over time, as one figure."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from e2former_fairchem.pes.plot import COLOURS, STYLE


def draw(columns: dict[str, np.ndarray], atoms: int, temperature: float | None, title: str, subtitle: str) -> Figure:
    """The figure.

    Args:
        columns: of the log, see `record.read_log`.
        atoms: number of atoms.
        temperature: K of the thermostat, or None without one.
        title: what was simulated.
        subtitle: how, in one line.
    """
    time = columns["time"]
    with rc_context(STYLE):
        pressure = np.isfinite(columns["pressure"]).all()
        panels = 3 + pressure
        figure = Figure(figsize=(6.7, 1.6 * panels + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(panels, 1, sharex=True)
        for ax, key, name, colour in (
            (axes[0], "potential_energy", "potential", COLOURS[0]),
            (axes[1], "total_energy", "total", COLOURS[2]),
        ):
            mean = columns[key].mean()
            ax.plot(time, 1000 * (columns[key] - mean) / atoms, color=colour)
            ax.set_title(f"{name} energy, mean {mean:.4f} eV", loc="left")
            ax.set_ylabel("less its mean\n(meV/atom)")
        axes[2].plot(time, columns["temperature"], color=COLOURS[1])
        axes[2].set_title(f"temperature, mean {columns['temperature'].mean():.1f} K", loc="left")
        axes[2].set_ylabel("K")
        if temperature is not None:
            axes[2].axhline(temperature, color="0.35", lw=0.8, ls=(0, (4, 3)), zorder=0)
        if pressure:
            axes[3].plot(time, columns["pressure"], color=COLOURS[3])
            axes[3].set_title(f"pressure, mean {columns['pressure'].mean():.3f} GPa", loc="left")
            axes[3].set_ylabel("GPa")
        axes[-1].set_xlabel("time (ps)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color="0.35")
    return figure
