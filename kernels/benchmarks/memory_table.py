"""Peak memory of attention and edge-degree embedding against the number of neighbours, at fixed atoms.

python kernels/benchmarks/memory_table.py [--atoms 6144 24576] [--neighbours 16 32 64 96]

Nothing of size edges x heads or edges x channels is in device memory, in any pass: edges are worked on in chunks whose
memory does not depend on their number. One layer of the paper's network; every atom hears its nearest neighbours,
all of them within CUTOFF.

Rows ``OP/PASS/ATOMS/NEIGHBOURS``. OP: ``attention`` (score qk), ``attention_qk_dot``, ``edge_degree``, all Triton, and
``dense``, the edge-materialised PyTorch attention of score qk, forward. PASS: forward, forward_backward (gradients of
an evaluation of forces; weights frozen, radial networks from splines where there are any), second (training on forces).
GiB: peak above what there was, with the lists that a graph's first evaluation makes; ms: eager, between CUDA events.

Rows ``growth/OP/PASS/ATOMS``. bytes_per_edge: by which the peak grows with one more edge, between 32 and 96 neighbours;
last: between the two largest numbers of neighbours, where runs are full even with few atoms (a graph smaller than a run
grows to one). Beside them the bytes of one float32 tensor of edges x heads and of edges x channels. An edge's vector,
gradient, and indices (its place by receiver, by sender and in a run) are about a hundred bytes. GiB and growth are a
GPU's only.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from attention_rows import AttentionCase
from op_table import PASSES, TOLERANCE, as_list, check_attention, difference
from torch import Tensor
from workload import GIB, TINY, Network, Results, System, attempt, common_arguments, free, measure, table

from e2former_kernels.common.backend import Mode
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.edge_degree import edge_degree_embedding, edge_degree_embedding_reference
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines, build_splines

#: Å. A corner atom of the water cluster has a hundred others within 13 Å.
CUTOFF = 16.0
#: Score of the attention by OP.
SCORES = {"attention": "qk", "attention_qk_dot": "qk_dot"}
OPERATIONS = (*SCORES, "edge_degree")
#: Neighbours between which growth is taken.
GROWTH = (32, 96)
CHECK_ATOMS = 192


class Attention(AttentionCase):
    """The attention over any number of neighbours."""

    def __init__(self, atoms: int, operation: str, device: str, tiny: bool = False) -> None:
        super().__init__(atoms, SCORES[operation], device, tiny)
        self.spec = dataclasses.replace(self.spec, envelope=Envelope(CUTOFF))

    def connect(self, system: System) -> None:
        """Take the edges of ``system``."""
        self.system = system
        self.vec = system.graph(system.pos).vec.detach().requires_grad_()
        self._collect()
        self.cotangents = [torch.randn_like(t) for t in self.features]


class EdgeDegree:
    """The edge-degree embedding, with the passes and options of :class:`Attention`."""

    def __init__(self, atoms: int, operation: str, device: str, tiny: bool = False) -> None:
        trunk = Network(**{"num_layers": 1} | (TINY if tiny else {})).to(device).trunk
        layer, config = trunk.edge_degree, trunk.config
        radial = layer.radial(layer.target_embedding.weight, layer.source_embedding.weight)
        self.radial = RadialWeights(*(None if t is None else t.detach().clone().requires_grad_() for t in radial))
        self.spec = layer.spec._replace(envelope=Envelope(CUTOFF))
        torch.manual_seed(1)
        self.grad = torch.randn(atoms // 3 * 3, (config.lmax + 1) ** 2, config.sphere_channels, device=device)

    def connect(self, system: System) -> None:
        """Take the edges of ``system``."""
        self.system = system
        self.vec = system.graph(system.pos).vec.detach().requires_grad_()
        self.cotangent = torch.randn_like(self.vec)

    def to_double(self) -> EdgeDegree:
        """The same numbers in float64."""
        self.radial = RadialWeights(*(None if t is None else t.detach().double().requires_grad_() for t in self.radial))
        self.vec, self.grad = self.vec.detach().double().requires_grad_(), self.grad.double()
        self.cotangent = self.cotangent.double()
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [t for t in self.radial if t is not None]

    def frozen(self, frozen: bool) -> None:
        for weight in self.weights:
            weight.requires_grad_(not frozen)

    def splines(self) -> RadialSplines | None:
        """Splines of the radial networks without their last layer; None where there are none."""
        return build_splines(self.radial, CUTOFF, sorted(set(self.system.numbers.tolist())), last=False)

    def call(self, form: str, splines: RadialSplines | None = None) -> Tensor:
        """``triton``, or ``dense``: PyTorch."""
        given = self.spec, self.vec, self.system.edge_list(), self.radial
        if form == "triton":
            trained = torch.is_grad_enabled() and any(w.requires_grad for w in self.weights)
            mode = Mode(trained, precision=torch.get_float32_matmul_precision())
            return edge_degree_embedding(*given, splines=splines, mode=mode)
        return edge_degree_embedding_reference(*given, recompute=False)

    def forward(self, form: str, splines: RadialSplines | None = None) -> Tensor:
        with torch.no_grad():
            return self.call(form, splines)

    def forward_backward(self, form: str, splines: RadialSplines | None = None) -> list[Tensor]:
        return list(torch.autograd.grad(self.call(form, splines), [self.vec], self.grad))

    def second(self, form: str, splines: RadialSplines | None = None) -> list[Tensor]:
        (first,) = torch.autograd.grad(self.call(form, splines), [self.vec], self.grad, create_graph=True)
        inputs = [self.vec, *self.weights]
        functional = (first * self.cotangent).sum()
        return list(torch.autograd.grad(functional, inputs, allow_unused=True, materialize_grads=True))

    def passes(self) -> dict[str, Callable]:
        return {"forward": self.forward, "forward_backward": self.forward_backward, "second": self.second}


def case_of(operation: str, atoms: int, args) -> Attention | EdgeDegree:
    return (EdgeDegree if operation == "edge_degree" else Attention)(atoms, operation, args.device, args.tiny)


def check_edge_degree(args) -> dict:
    """The passes against PyTorch in float64, within what ``op_table.check_attention`` allows."""
    atoms = 6 if args.tiny else CHECK_ATOMS
    case = case_of("edge_degree", atoms, args)
    case.connect(System(atoms, 32, args.device, cutoff=CUTOFF))
    exact = copy.copy(case).to_double()
    found: dict = {"ok": True, "limits": {}}
    for name in args.passes:
        for c in (case, exact):
            c.frozen(name != "second")
        wanted = as_list(exact.passes()[name]("dense"))
        spline = None if name == "second" else case.splines()
        found[name] = difference(as_list(case.passes()[name]("triton", spline)), wanted)
        found[f"{name}_dense"] = difference(as_list(case.passes()[name]("dense")), wanted)
        allowed = max(TOLERANCE[torch.get_float32_matmul_precision()], 2 * found[f"{name}_dense"])
        found["limits"][name] = allowed
        found["ok"] = found["ok"] and found[name] < allowed
    return found


def rows_of(operation: str, atoms: int, args, results: Results) -> None:
    """Rows of one operation with one number of atoms."""
    case = case_of(operation, atoms, args)
    for neighbours in args.neighbours:
        system = System(atoms, neighbours, args.device, cutoff=CUTOFF)
        case.connect(system)
        spline = case.splines()
        for name in args.passes:
            case.frozen(name != "second")
            forms = {operation: ("triton", None if name == "second" else spline)}
            if operation == "attention" and name == "forward":
                forms["dense"] = ("dense", None)
            for op, (form, splines) in forms.items():
                call = lambda n=name, f=form, s=splines: case.passes()[n](f, s)  # noqa: E731
                row = measure(call, args.repeats, 1)
                results.add(f"{op}/{name}/{atoms}/{neighbours}", row | {"edges": system.edges})


def growth(few: dict, many: dict) -> float | None:
    """Bytes by which the peak grows with one more edge; None where a row failed or has no memory."""
    if not all("GiB" in row for row in (few, many)) or many["edges"] <= few["edges"]:
        return None
    return (many["GiB"] - few["GiB"]) * GIB / (many["edges"] - few["edges"])


def growth_rows(rows: dict[str, dict], neighbours: Sequence[int], heads: int, channels: int) -> dict[str, dict]:
    """``growth/OP/PASS/ATOMS`` from the rows of the measurements."""
    ordered, found = sorted(neighbours), {}
    few, many = GROWTH if set(GROWTH) <= set(neighbours) else (ordered[0], ordered[-1])
    for name in dict.fromkeys(key.rpartition("/")[0] for key in rows if key.count("/") == 3):
        figures = {
            label: growth(rows.get(f"{name}/{a}", {}), rows.get(f"{name}/{b}", {}))
            for label, (a, b) in (("bytes_per_edge", (few, many)), ("last", (ordered[-2], ordered[-1])))
        }
        figures = {label: value for label, value in figures.items() if value is not None}
        if figures:
            found[f"growth/{name}"] = figures | {"edges_x_heads": 4 * heads, "edges_x_channels": 4 * channels}
    return found


def main() -> None:
    parser = common_arguments(__doc__, "memory")
    parser.add_argument("--atoms", type=int, nargs="*", default=[6144, 24576])
    parser.add_argument("--neighbours", type=int, nargs="*", default=[16, 32, 64, 96], help="two numbers or more")
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--passes", nargs="*", default=list(PASSES), choices=PASSES)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if len(set(args.neighbours)) < 2:
        parser.error(f"--neighbours: expected two numbers or more, got {args.neighbours}")
    torch.set_float32_matmul_precision(args.precision)
    results = Results(args.name, args.output)
    if not args.no_gate:
        for name in args.operations:
            found = check_edge_degree(args) if name == "edge_degree" else check_attention(SCORES[name], args)
            if not results.add(f"gate/{name}", found)["ok"]:
                raise SystemExit(f"gate: red for {name}, nothing was measured")
            free()
    for name in args.operations:
        for atoms in args.atoms:
            failed = attempt(lambda n=name, a=atoms: rows_of(n, a, args, results) or {})
            if "error" in failed:
                results.add(f"{name}/inputs/{atoms}", failed)
    config = Network(**{"num_layers": 1} | (TINY if args.tiny else {})).trunk.config
    for name, row in growth_rows(results, args.neighbours, config.num_heads, config.sphere_channels).items():
        results.add(name, row)
    columns = ("ms", "GiB", "edges", "bytes_per_edge", "last", "edges_x_heads", "edges_x_channels")
    print(table({k: v for k, v in results.items() if "gate" not in k}, columns))


if __name__ == "__main__":
    main()
