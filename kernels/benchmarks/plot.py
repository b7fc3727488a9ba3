"""Picture of time and memory against the number of atoms, with the peers: docs/images/speed.png from results/*.json.

python kernels/benchmarks/plot.py [--ours results/model_32_neighbours_tf32.json] [--output docs/images/speed.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

HERE = Path(__file__).resolve().parent
PEERS = HERE / "results" / "peers_energy_forces.json"
OURS = HERE / "results" / "model_32_neighbours_tf32.json"
GPU_GIB = 139.0  # of an H200
# Blue for ours, quieter hues for the others; told apart by marker too.
STYLES = (
    ("#0b5fa5", "o", 2.4),
    ("#c4651a", "s", 1.5),
    ("#4a8f3c", "^", 1.5),
    ("#9bbf5f", "v", 1.5),
    ("#8456a3", "D", 1.5),
)


def read_ours(path: Path) -> tuple[dict[int, dict[str, float]], dict[str, str]]:
    """Energy-and-forces rows of a model table (atoms -> ms, GiB), and the machine they were measured on."""
    content = json.loads(path.read_text())
    prefix = "triton/energy_forces/"
    rows = {int(k.removeprefix(prefix)): v for k, v in content["rows"].items() if k.startswith(prefix) and "ms" in v}
    return rows, content["machine"]


def draw(series: dict[str, dict[int, dict[str, float]]], footer: str, output: Path) -> None:
    """Two log-log panels, time and peak memory, one line for each series."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
    for panel, key, label in zip(panels, ("ms", "GiB"), ("energy and forces (ms)", "peak memory (GiB)"), strict=True):
        for (name, rows), (colour, marker, width) in zip(series.items(), STYLES, strict=False):
            atoms = sorted(rows)
            panel.plot(
                atoms, [rows[n][key] for n in atoms], color=colour, marker=marker, lw=width, ms=5.5, label=name,
                zorder=3 if width > 2 else 2,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="atoms", ylabel=label)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.grid(True, which="major", color="0.9", lw=0.8)
    panels[1].axhline(GPU_GIB, color="0.45", lw=1, ls="--")
    panels[1].annotate(
        "one H200", (1, GPU_GIB), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.35", fontsize=9
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.text(0.995, 0.005, footer, ha="right", va="bottom", fontsize=7, color="0.45")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=Path, default=OURS)
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "docs" / "images" / "speed.png")
    args = parser.parse_args()
    ours, machine = read_ours(args.ours)
    peers = json.loads(PEERS.read_text())
    series = {"this package (24.4 M, TF32, 32 neighbours)": ours}
    series |= {name: {int(n): row for n, row in rows.items()} for name, rows in peers["series"].items()}
    footer = (
        f"{machine['gpu']}, water clusters, edges given, random weights. This package: commit {machine['commit']}; "
        f"the others: another day, a machine of the same kind ({PEERS.name})."
    )
    draw(series, footer, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
