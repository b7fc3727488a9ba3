"""Energy and forces, and one training step, of the whole network: time and peak memory against the number of atoms.

python kernels/benchmarks/model_table.py [--neighbours 32] [--peers] [--baseline] [--output FOLDER]

The paper's network on open water clusters with given edges: the nearest 32 of each atom, or with --neighbours 0 all
within 6 Å (about 75). Rows ``triton/energy_forces/ATOMS`` and ``triton/train_{direct,conserving}/ATOMS``; with
--baseline also ``dense/...``, the edge-materialised PyTorch attention in the same network. ``growth`` compares time and
memory of the largest system with those of 6,144 atoms: ratios over the ratio of atoms, 1 is linear.

--peers adds eSCN-MD of UMA-S's shape (6.3 M, random weights) on the same atoms and edges in the same run, rows
``escn_NEIGHBOURS/energy_forces/ATOMS``: one call of MLIPPredictUnit.predict with TF32 and merged experts in the fastest
mode that fairchem chooses (``umas_fast_gpu``), with the edges given in the data; unlike ours the call contains
fairchem's handling of the batch, a millisecond or so. --compile adds ``escn_NEIGHBOURS_compiled``.
"""

from __future__ import annotations

import torch
from gate import gate
from workload import TINY, Network, Results, System, attempt, common_arguments, free, measure, table

from e2former_kernels.equivariant_attention.score import SCORES

REFERENCE_ATOMS = 6144  # from here on growth is measured


def network_rows(form: str, config: dict, args, results: Results) -> None:
    """Training steps, then energy and forces with frozen weights, until a system does not fit."""
    model = Network(**config).to(args.device)
    edges = args.neighbours or None
    for atoms in args.train:
        system = System(atoms, edges, args.device)
        for conserving in (False, True):
            name = f"{form}/train_{'conserving' if conserving else 'direct'}/{atoms}"
            warmup = 1 if args.tiny else 2
            row = measure(lambda s=system, c=conserving: model.training_step(s, c), args.repeats, warmup)
            results.add(name, row | {"edges": system.edges})
            model.zero_grad(set_to_none=True)
    model.freeze()
    for atoms in args.atoms:
        name = f"{form}/energy_forces/{atoms}"
        try:
            system = System(atoms, edges, args.device)
        except Exception as error:
            results.add(name, {"error": f"edges: {error}"[:300]})
            break
        model.forget()
        row = measure(lambda s=system: model.energy_forces(s), args.repeats, *([2] if args.tiny else []))
        row = results.add(name, row | {"edges": system.edges})
        if row.get("error") == "out of memory":
            break
    model.forget()
    free()


def peer_rows(args, results: Results, compiled: bool) -> None:
    """eSCN-MD through fairchem's predict unit."""
    from predictors import batch_of, escn, execution_mode, parameters_of, predict_unit, quiet, settings_of

    form = f"escn_{args.neighbours or 'all'}{'_compiled' if compiled else ''}"

    with quiet():
        unit = predict_unit(escn(args.tiny), args.device, settings_of(compiled, given_edges=True))

        def row(atoms: int) -> dict:
            system = System(atoms, args.neighbours or None, args.device)
            batch = batch_of(system)
            found = measure(lambda: unit.predict(batch), args.repeats, 2 if args.tiny else 3)
            return found | {"edges": system.edges, "mode": execution_mode(unit), "parameters": parameters_of(unit)}

        for atoms in args.peer_atoms or args.atoms:
            found = results.add(f"{form}/energy_forces/{atoms}", attempt(lambda n=atoms: row(n)))
            if found.get("error") == "out of memory":
                break
    free()


def growth(results: Results, form: str, args) -> None:
    """Time and memory of the largest system over those of REFERENCE_ATOMS, each over the ratio of atoms."""
    rows = {n: results.get(f"{form}/energy_forces/{n}", {}) for n in args.atoms}
    sizes = sorted(n for n, row in rows.items() if "ms" in row)
    if REFERENCE_ATOMS not in sizes or sizes[-1] == REFERENCE_ATOMS:
        return
    small, large, ratio = rows[REFERENCE_ATOMS], rows[sizes[-1]], sizes[-1] / REFERENCE_ATOMS
    row = {"atoms": f"{REFERENCE_ATOMS} to {sizes[-1]}", "time_over_linear": large["ms"] / small["ms"] / ratio}
    if "GiB" in small:
        row["memory_over_linear"] = large["GiB"] / small["GiB"] / ratio
    results.add(f"{form}/growth", row)


def main() -> None:
    parser = common_arguments(__doc__, "model")
    parser.add_argument("--neighbours", type=int, default=32, help="nearest neighbours; 0 for all within 6 Å")
    parser.add_argument("--atoms", type=int, nargs="*", default=[192, 1536, 6144, 24576, 98304])
    parser.add_argument("--train", type=int, nargs="*", default=[1536, 6144])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--score", default="qk", choices=SCORES)
    parser.add_argument("--baseline", action="store_true", help="also the edge-materialised PyTorch attention")
    parser.add_argument("--checkpoint", action="store_true", help="recompute every block in the backward pass")
    parser.add_argument("--no-cuda-graph", action="store_true", help="never replay the trunk from CUDA graphs")
    parser.add_argument("--no-ours", action="store_true", help="the peers alone")
    parser.add_argument("--peers", action="store_true", help="also eSCN-MD of UMA-S's shape, on the same edges")
    parser.add_argument("--peer-atoms", type=int, nargs="*", help="sizes of the peers (default: as ours)")
    parser.add_argument("--compile", action="store_true", help="the peers compiled too")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    results = Results(args.name, args.output)
    if not args.no_gate and not args.no_ours:
        results["gate"] = gate(args.device, args.tiny, None if args.score == "qk" else (args.score,))
    torch.set_float32_matmul_precision(args.precision)
    forms = {} if args.no_ours else {"triton": {"kernel_backend": "triton"}}
    if args.baseline:
        forms["dense"] = {"kernel_backend": "reference", "convolution": "dense"}
    common = {"score": args.score, "activation_checkpointing": args.checkpoint, "cuda_graph": not args.no_cuda_graph}
    for form, config in forms.items():
        config = common | (TINY if args.tiny else {}) | config
        failed = attempt(lambda f=form, c=config: network_rows(f, c, args, results) or {})
        if "error" in failed:
            results.add(f"{form}/failed", failed)
        growth(results, form, args)
    for compiled in ((False, True) if args.compile else (False,)) if args.peers else ():
        failed = attempt(lambda c=compiled: peer_rows(args, results, c) or {})
        if "error" in failed:
            results.add(f"escn{'_compiled' if compiled else ''}/failed", failed)
    print(table({k: v for k, v in results.items() if k != "gate"}, ("ms", "min_ms", "GiB", "edges")))


if __name__ == "__main__":
    main()
