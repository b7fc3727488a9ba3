"""The largest system whose energy and forces fit on the card: time and memory of the sizes given, or by bisection.

python kernels/benchmarks/largest.py [--atoms 399999 999999] [--tries 2] [--neighbours 32] [--output FOLDER]

Sizes are tried in ascending order until one does not fit. --tries N then narrows down the limit: first where the memory
of the largest system that fits, taken to be proportional to the atoms, fills the card, then half way between the
largest that fits and the smallest that does not. Row ``ATOMS``: ms, GiB above what was there before (atoms, edges and
weights), total_GiB with them, and how long the search for neighbours took on the CPU.
"""

from __future__ import annotations

import time

import torch
from gate import gate
from workload import TINY, Network, Results, System, attempt, common_arguments, free, measure

#: Bisection ends when the limit is known to this share.
RESOLUTION = 0.03
#: Share of the card that a guess from the measured memory fills.
FILL = 0.97


def evaluate(model: Network, atoms: int, args) -> dict:
    """Row of one size."""
    start = time.perf_counter()
    system = System(atoms, args.neighbours or None, args.device)
    seconds = time.perf_counter() - start
    # two warm-up calls: the latter makes the tables of the radial networks
    row = measure(lambda: model.energy_forces(system), args.repeats, 2)
    if "total_GiB" in row:
        row["us_per_atom"] = 1e3 * row["ms"] / system.atoms
        row["total"] = f"{row['total_GiB']:.1f} GiB"
    return row | {"edges": system.edges, "neighbours_s": round(seconds, 1)}


def card_gib(device: str) -> float:
    return torch.cuda.mem_get_info()[1] / (1 << 30) if device == "cuda" else 0.0


def next_size(fits: dict[int, dict], fails: list[int], card: float) -> int | None:
    """Size to try after these; None when the limit is known well enough, or nothing fits."""
    if not fits:
        return None
    low, high = max(fits), min(fails, default=None)
    if high is not None and high - low < RESOLUTION * high:
        return None
    total = fits[low].get("total_GiB")
    guess = low * FILL * card / total if total else 0.0
    if guess < (1 + RESOLUTION) * low or (high is not None and guess >= high):
        if high is None:
            return None
        guess = (low + high) / 2
    return int(guess) // 3 * 3


def main() -> None:
    parser = common_arguments(__doc__, "largest")
    parser.add_argument("--atoms", type=int, nargs="*", default=[399_999, 999_999])
    parser.add_argument("--tries", type=int, default=2, help="further sizes, to narrow down the limit")
    parser.add_argument("--neighbours", type=int, default=32, help="nearest neighbours; 0 for all within 6 Å")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if not args.no_gate:
        gate(args.device, args.tiny, ("qk",))
    torch.set_float32_matmul_precision(args.precision)
    results = Results(args.name, args.output)
    # graphs serve small systems, and a capture would hold memory
    widths = (TINY if args.tiny else {}) | {"kernel_backend": "triton", "cuda_graph": False}
    model = Network(**widths).to(args.device).freeze()
    card = card_gib(args.device)
    fits: dict[int, dict] = {}
    fails: list[int] = []

    def attempt_size(atoms: int) -> bool:
        row = results.add(f"{atoms}", attempt(lambda: evaluate(model, atoms, args)))
        free()
        if "error" not in row:
            fits[atoms] = row
        else:
            fails.append(atoms)
        return "error" not in row

    for atoms in sorted(args.atoms):
        if not attempt_size(atoms):
            break
    for _ in range(args.tries):
        atoms = next_size(fits, fails, card)
        if atoms is None or atoms in fits or atoms in fails:
            break
        attempt_size(atoms)
    if fits:
        largest = max(fits)
        results.add("largest", {"atoms": largest, "fails": min(fails, default=None), "card_GiB": round(card, 1)})


if __name__ == "__main__":
    main()
