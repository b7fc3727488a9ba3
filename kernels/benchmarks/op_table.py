"""The attention and its convolution stage alone: Triton kernels against the edge-materialised PyTorch implementation.

python kernels/benchmarks/op_table.py [--atoms 6144 24576] [--convolution 1536 6144 24576 98304] [--precision highest]

Rows ``attention/SCORE/FORM/PASS/ATOMS``. FORM: ``triton``, which takes radial networks from splines where weights are
frozen and the score has them, ``triton_network`` without splines, ``dense`` the baseline. PASS: forward,
forward_backward (gradients of an evaluation of forces), second (training on forces). ms is eager, between CUDA events;
graph_ms the replay of the same calls from a CUDA graph, what the GPU needs without the host. TFLOPs, GBs and floor_ms
follow floor.py, from the replay where there is one. Rows ``convolution/FORM/ATOMS``: given the weights of the edges,
everything up to the path rows, forward. A form that differs from the baseline is an error instead of a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from attention_rows import AttentionCase
from convolution_rows import ConvolutionCase
from floor import attention_work
from torch import Tensor
from workload import Results, attempt, ceilings, common_arguments, free, measure, measure_graph, relative_error, table

from e2former_kernels.equivariant_attention.score import SCORES

PASSES = ("forward", "forward_backward", "second")
#: Atoms of the check before the timings.
CHECK_ATOMS = 192
#: Largest relative difference of a form from the baseline in float64, strict and with TF32: three times what the worst
#: score and pass has on an H200 (``results/operations_limits.json``).
TOLERANCE = {"highest": 4e-5, "high": 4.9e-3}
#: The same of the convolution's forms from each other: three times the worst form there.
CONVOLUTION = {"highest": 5.3e-6, "high": 1.1e-2}


def difference(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error of several tensors; those that should vanish are left out."""
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if float(b.norm()) > 0]
    return max(relative_error(a.detach(), b.detach()) for a, b in pairs)


def check_attention(score: str, args) -> dict:
    """The three passes of the Triton form against the baseline in float64: the worst tensor's relative error.

    Beside it the error of the baseline in the same precision; twice that is allowed too, where the tolerance is less.
    """
    case = AttentionCase(6 if args.tiny else CHECK_ATOMS, score, args.device, args.tiny)
    exact = AttentionCase(6 if args.tiny else CHECK_ATOMS, score, args.device, args.tiny)
    exact.to_double()
    found: dict = {}
    tolerance = TOLERANCE[torch.get_float32_matmul_precision()]
    for name in PASSES:
        for c in (case, exact):
            c.frozen(name != "second")
        tables = (None, case.splines()) if name != "second" else (None,)
        wanted = as_list(exact.passes()[name]("dense"))
        for spline in tables:
            key = name if spline is None else f"{name}_spline"
            found[key] = difference(as_list(case.passes()[name]("triton", spline)), wanted)
        found[f"{name}_dense"] = difference(as_list(case.passes()[name]("dense")), wanted)
    limits = {k: max(tolerance, 2 * found[f"{k.removesuffix('_spline')}_dense"]) for k in found if "_dense" not in k}
    return found | {"limits": limits, "ok": all(found[k] < limit for k, limit in limits.items())}


def as_list(x: Tensor | list[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else x


def timed(call: Callable[[], object], args, work=None, limits: dict | None = None) -> dict:
    """Row of one call, with rates where the work is known."""
    row = measure(call, args.repeats, 1 if args.tiny else 3)
    if "error" in row:
        return row
    if not args.no_graphs:
        row |= measure_graph(call, gib=row.get("GiB", 0.0))
    if work is not None:
        row |= work.rates(row.get("graph_ms", row["ms"]))
        if limits:
            row["floor_ms"] = work.floor_ms(limits["product_TFLOPs"], limits["copy_TBs"])
    return row


def attention_table(atoms: int, score: str, args, results: Results, limits: dict) -> None:
    """Rows of one score at one size; a case that does not fit is a row too."""
    try:
        case = AttentionCase(atoms, score, args.device, args.tiny)
        spline = case.splines()
    except Exception as error:
        results.add(f"attention/{score}/inputs/{atoms}", attempt(lambda e=error: _raise(e)))
        return
    forms = {"triton": ("triton", spline), "triton_network": ("triton", None), "dense": ("dense", None)}
    if spline is None:
        del forms["triton_network"]
    for name in args.passes:
        case.frozen(name != "second")
        work = attention_work(case.shape, case.system.atoms, case.system.edges, name)
        for form, (how, splines) in forms.items():
            if name == "second" and form == "triton_network":
                continue  # weights that are trained have no splines: the same call
            chosen = None if name == "second" else splines
            call = lambda n=name, h=how, s=chosen: case.passes()[n](h, s)  # noqa: E731
            results.add(f"attention/{score}/{form}/{name}/{atoms}", timed(call, args, work, limits))
        rows = {f: results.get(f"attention/{score}/{f}/{name}/{atoms}", {}) for f in ("triton", "dense")}
        ratios = {
            key.replace("ms", "speedup"): rows["dense"][key] / rows["triton"][key]
            for key in ("ms", "graph_ms")
            if all(key in row for row in rows.values())
        }
        if ratios:
            results.add(f"attention/{score}/speedup/{name}/{atoms}", ratios)


def _raise(error: Exception) -> dict:
    raise error


def convolution_table(case: ConvolutionCase, atoms: int, args, results: Results) -> None:
    """Rows of the convolution stage at one size."""
    exact = case.on_the_fly()
    tolerance = CONVOLUTION[torch.get_float32_matmul_precision()]

    def row(make: Callable[[], tuple[Callable, Callable]]) -> dict:
        call, as_rows = make()
        error = relative_error(as_rows(call()), exact)
        if not error < tolerance:
            return {"error": f"relative difference {error:.2e}, not timed"}
        return timed(call, args) | {"difference": error}

    def itself(x: Tensor) -> Tensor:
        return x

    makers = {name: (lambda f=form: (f, itself)) for name, form in case.forms().items()}
    for name, make in (makers | {"dense_e3nn": case.e3nn}).items():
        results.add(f"convolution/{name}/{atoms}", attempt(lambda m=make: row(m)))
    rows = {n: results[f"convolution/{n}/{atoms}"] for n in ("dense", "on_the_fly", "eaas", "node_factored_dense")}
    key = "graph_ms" if all("graph_ms" in r for r in rows.values() if "ms" in r) else "ms"
    if key in rows["dense"]:
        ratios = {n: rows["dense"][key] / row[key] for n, row in rows.items() if key in row and n != "dense"}
        results.add(f"convolution/speedup/{atoms}", ratios)


def main() -> None:
    parser = common_arguments(__doc__, "operations")
    parser.add_argument("--atoms", type=int, nargs="*", default=[6144, 24576], help="of the attention")
    parser.add_argument("--convolution", type=int, nargs="*", default=[1536, 6144, 24576, 98304])
    parser.add_argument("--scores", nargs="*", default=list(SCORES), choices=SCORES)
    parser.add_argument("--passes", nargs="*", default=list(PASSES), choices=PASSES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-graphs", action="store_true", help="eager times only")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    results = Results(args.name, args.output)
    limits = ceilings(args.device)
    results.add("ceilings", limits)
    if not args.no_gate:
        red = []
        for score in args.scores if args.atoms else ():
            row = results.add(f"gate/{score}", check_attention(score, args))
            red += [] if row["ok"] else [score]
        if red:
            raise SystemExit(f"gate: red for {red}, no timings")
    for atoms in args.convolution:
        make = partial(ConvolutionCase, atoms, args.device, args.tiny)
        failed = attempt(lambda n=atoms, make=make: convolution_table(make(), n, args, results) or {})
        if "error" in failed:
            results.add(f"convolution/inputs/{atoms}", failed)
    for score in args.scores:
        for atoms in args.atoms:
            attention_table(atoms, score, args, results, limits)
            free()
    columns = ("ms", "graph_ms", "GiB", "TFLOPs", "GBs", "floor_ms")
    print(table({k: v for k, v in results.items() if "gate" not in k}, columns))


if __name__ == "__main__":
    main()
