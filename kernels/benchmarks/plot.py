"""Picture of time and memory against the number of atoms, with the peers: docs/images/speed.png from results/*.json.

python kernels/benchmarks/plot.py [--runs results/model_32.json results/model_all.json results/largest.json]

--runs: files of model_table.py (rows of ours, of the edge-materialised baseline, and of eSCN-MD from the same run) and
of largest.py. Codes that no run measured come from results/peers_energy_forces.json, another day on a machine of the
same kind: their markers are hollow. Series with the 32 nearest neighbours are solid, with all of them dashed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

HERE = Path(__file__).resolve().parent
PEERS = HERE / "results" / "peers_energy_forces.json"
RUNS = [HERE / "results" / "model_32.json"]
Rows = dict[int, dict[str, float]]


class Style(NamedTuple):
    """label: in the legend. elsewhere: name of the series in the file of peers."""

    label: str
    colour: str
    marker: str
    dashed: bool = False
    wide: bool = False
    elsewhere: str | None = None


BLUE, GREY, ORANGE, GREEN, PURPLE = "#0b5fa5", "#7a7a7a", "#c4651a", "#3f8f3c", "#8456a3"
AUTHORS = "E2Former-V2, authors' code (24.4 M, fp32, 32 neighbours)"
ESCN_32 = "eSCN-MD, UMA-S shape (6.3 M, TF32, 32 neighbours)"
ESCN_ALL = "eSCN-MD, UMA-S shape (6.3 M, TF32, all within 6 Å)"
MACE = "MACE 128x0e+128x1o, cuEquivariance (0.64 M, TF32, all within 5 Å)"
STYLES = {
    "triton_32": Style("this package, 24.4 M, 32 neighbours", BLUE, "o", wide=True),
    "triton_all": Style("this package, all within 6 Å", BLUE, "o", dashed=True, wide=True),
    "dense_32": Style("the same network, PyTorch with edge tensors", GREY, "P"),
    "authors": Style("E2Former-V2, authors' code, 24.4 M, fp32, 32 neighbours", ORANGE, "s", elsewhere=AUTHORS),
    "escn_32": Style("eSCN-MD, UMA-S's shape, 6.3 M, 32 neighbours", GREEN, "^", elsewhere=ESCN_32),
    "escn_all": Style("eSCN-MD, all within 6 Å", GREEN, "^", dashed=True, elsewhere=ESCN_ALL),
    "escn_all_compiled": Style("eSCN-MD, all within 6 Å, compiled", "#9bbf5f", "v", dashed=True),
    "mace": Style("MACE 128x0e+128x1o, 0.64 M, cuEquivariance, all within 5 Å", PURPLE, "D", True, elsewhere=MACE),
}


def read_run(path: Path) -> tuple[dict[str, Rows], dict]:
    """Series of one results file by the keys of STYLES, and the machine it was measured on."""
    content = json.loads(path.read_text())
    series: dict[str, Rows] = {}
    words = content.get("command", "").split()
    everything = "--neighbours" in words and words[words.index("--neighbours") + 1] == "0"
    for name, row in content["rows"].items():
        if not isinstance(row, dict) or "ms" not in row or "GiB" not in row:
            continue
        form, _, rest = name.partition("/energy_forces/")
        if name.isdigit():  # of largest.py
            form, rest = "triton", name
        if not rest.isdigit():
            continue
        key = form if form.startswith("escn") else f"{form}_{'all' if everything else '32'}"
        series.setdefault(key, {})[int(rest)] = row
    return series, content["machine"]


def collect(paths: list[Path]) -> tuple[dict[str, Rows], set[str], dict]:
    """All series, those of another day among them, and the machine of the first run."""
    series: dict[str, Rows] = {}
    machines = []
    for path in paths:
        found, machine = read_run(path)
        machines.append(machine)
        for key, rows in found.items():
            # a size measured twice: the first file counts
            series[key] = rows | series.get(key, {})
    elsewhere = set()
    peers = json.loads(PEERS.read_text())["series"]
    for key, style in STYLES.items():
        if key not in series and style.elsewhere in peers:
            series[key] = {int(n): row for n, row in peers[style.elsewhere].items()}
            elsewhere.add(key)
    return {key: series[key] for key in STYLES if key in series}, elsewhere, machines[0]


def draw(series: dict[str, Rows], elsewhere: set[str], footer: str, card: str, gib: float, output: Path) -> None:
    """Two log-log panels, time and peak memory, one line for each series."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 5.0), layout="constrained")
    for panel, key, label in zip(panels, ("ms", "GiB"), ("energy and forces (ms)", "peak memory (GiB)"), strict=True):
        for name, rows in series.items():
            style, atoms = STYLES[name], sorted(rows)
            panel.plot(
                atoms, [rows[n][key] for n in atoms], color=style.colour, marker=style.marker, label=style.label,
                ls=(0, (4, 2)) if style.dashed else "-", lw=2.4 if style.wide else 1.4, ms=5.5,
                mfc="white" if name in elsewhere else style.colour, zorder=3 if style.wide else 2,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="atoms", ylabel=label)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        if key == "ms":
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="major", color="0.9", lw=0.8)
    panels[1].axhline(gib, color="0.45", lw=1, ls=":")
    panels[1].annotate(
        f"one {card}", (0.02, gib), xycoords=("axes fraction", "data"), ha="left", va="bottom", color="0.35", fontsize=9
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, handlelength=3.2)
    figure.text(0.995, 0.006, footer, ha="right", va="bottom", fontsize=7, color="0.4")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=RUNS)
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "docs" / "images" / "speed.png")
    args = parser.parse_args()
    series, elsewhere, machine = collect(args.runs)
    card = machine["gpu"].removeprefix("NVIDIA ").split(" 80GB")[0]
    footer = f"{machine['gpu']}, water clusters, edges given, random weights, TF32; commit {machine['commit'][:7]}."
    if elsewhere:
        footer += " Hollow markers: another day, one NVIDIA H200."
    draw(series, elsewhere, footer, card, machine.get("gpu_GiB", 139.0), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
