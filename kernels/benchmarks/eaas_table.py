"""The EAAS layer's kernels against a copy of the same bytes.

python kernels/benchmarks/eaas_table.py [--atoms 1024 6144 24576 98304] [--lmax 2] [--channels 256]
    [--tiles 256,160 ...]

Rows ``PASS/ATOMS``. PASS: ``forward`` T(r) v; ``transposed`` T(r)^T g; ``slope``, the gradient by the position;
``backward``, both gradients in one pass, as an evaluation of forces wants them. --tiles: pairs TILE,HELD of
``e2former_kernels/eaas/op.py`` to try; their rows end in @TILE,HELD where more than one is given. Records before
November 28, 2026 have rows of other forms too: T(r) by a matrix product, sums over its nonzeros.

ms, graph_ms as in op_table.py. floor_ms: the inputs read and the outputs written once at the measured copy rate (GBs
refer to the same bytes), ``of_copy`` = floor_ms / time: above one where the tensors stay in the L2 cache from call to
call, as some 1,000 atoms' do. A pass whose result differs from the dense contraction in float64, looked at for the
first and the last atoms, is an error instead of a time; the first sit at the origin and on the polar axis.
"""

from __future__ import annotations

import torch
from floor import Work
from op_table import difference, timed
from torch import Tensor
from workload import Results, attempt, ceilings, common_arguments, free, table, water_cluster

from e2former_fairchem.nn.axis_aligned import eaas_constants
from e2former_fairchem.so3 import make_paths
from e2former_kernels.eaas import dense_contraction_reference
from e2former_kernels.eaas import op as layer

#: Atoms at both ends that are compared.
LOOK = 32
#: Largest relative error, three times what an H100 gave (``results/eaas.json``).
STRICT = 5e-7
SINGULAR = [[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, -2.0, 0.0], [1e-9, -1.0, 0.0], [1e-22, 1e-3, 1e-22]]
PASSES = ("forward", "transposed", "slope", "backward")


class EAASCase:
    """value [N, M, C], gradient of the path rows [N, P, C], positions [N, 3] about their centre."""

    def __init__(self, atoms: int, lmax: int, channels: int, device: str) -> None:
        exact = eaas_constants(make_paths(lmax))
        self.constants = type(exact)(
            exact.coupling.float().to(device), exact.aligned_index.to(device), exact.aligned_value.float().to(device),
            tuple(m.float().to(device) for m in exact.recursion), exact.row_paths, exact.lists,
        )  # fmt: skip
        pos = torch.tensor(water_cluster(atoms // 3)[0], dtype=torch.float32)
        pos = pos - pos.mean(0)
        pos[: len(SINGULAR)] = torch.tensor(SINGULAR)[: len(pos)]
        self.pos, self.atoms, self.channels = pos.to(device), len(pos), channels
        torch.manual_seed(1)
        paths, _, rows = exact.coupling.shape
        self.value = torch.randn(self.atoms, rows, channels, device=device)
        self.grad = torch.randn(self.atoms, paths, channels, device=device)

    def work(self, name: str) -> Work:
        """Products of the nonzeros, and every tensor once."""
        paths, _, rows = self.constants.coupling.shape
        once = 2 * int((self.constants.coupling.abs() > 1e-6).sum()) * self.channels
        streamed = 4 * self.channels * (paths + rows) + 12
        if name == "backward":
            return Work(3 * once * self.atoms, 0, (streamed + 4 * self.channels * rows + 12) * self.atoms)
        return Work((2 if name == "slope" else 1) * once * self.atoms, 0, streamed * self.atoms)

    def run(self, name: str) -> list[Tensor]:
        """A pass."""
        t, pos, value, grad = self.constants, self.pos, self.value, self.grad
        if name == "backward":
            return list(layer.pullback(t, pos, grad, value))
        if name == "slope":
            return [layer.slope(t, grad, value)]
        return [layer.contract(t, pos, *((grad, True) if name == "transposed" else (value, False)))]

    def exact(self, name: str, at: slice) -> list[Tensor]:
        """The pass in float64 from the dense contraction, for some atoms."""
        value, pos = (x[at].double().requires_grad_() for x in (self.value, self.pos))
        out = dense_contraction_reference(value, pos, self.constants)
        if name == "forward":
            return [out.detach()]
        found = list(torch.autograd.grad(out, [value, pos], self.grad[at].double()))
        return {"transposed": found[:1], "slope": found[1:], "backward": found}[name]


def check(case: EAASCase, name: str, found: list[Tensor]) -> float:
    """Largest relative error at the first and the last atoms."""
    ends = slice(0, LOOK), slice(max(case.atoms - LOOK, 0), None)
    return max(difference([x[at] for x in found], case.exact(name, at)) for at in ends)


def row_of(case: EAASCase, name: str, args, limits: dict) -> dict:
    """Check and time of one pass."""
    error = check(case, name, case.run(name))
    if not error < STRICT:
        return {"error": f"relative difference {error:.2e}, not timed"}
    row = timed(lambda: case.run(name), args, case.work(name), limits) | {"difference": error, "allowed": STRICT}
    if "floor_ms" in row:
        row["of_copy"] = row["floor_ms"] / row.get("graph_ms", row["ms"])
    return row


def main() -> None:
    parser = common_arguments(__doc__, "eaas")
    parser.add_argument("--atoms", type=int, nargs="*", default=[1024, 6144, 24576, 98304])
    parser.add_argument("--lmax", type=int, default=2)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--passes", nargs="*", default=list(PASSES), choices=PASSES)
    parser.add_argument("--tiles", nargs="*", default=[f"{layer.TILE},{layer.HELD}"], help="pairs TILE,HELD")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-graphs", action="store_true", help="eager times only")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    results = Results(args.name, args.output)
    limits = ceilings(args.device)
    results.add("ceilings", limits)
    before = layer.TILE, layer.HELD
    for atoms in args.atoms:
        case = EAASCase(atoms, args.lmax, 4 if args.tiny else args.channels, args.device)
        for name in args.passes:
            for tile in args.tiles:
                layer.TILE, layer.HELD = map(int, tile.split(","))
                suffix = f"@{tile}" if len(args.tiles) > 1 else ""
                row = attempt(lambda n=name, c=case: row_of(c, n, args, limits))
                results.add(f"{name}/{atoms}{suffix}", row)
        del case
        free()
    layer.TILE, layer.HELD = before
    print(table(results, ("ms", "graph_ms", "floor_ms", "of_copy", "GBs", "difference")))


if __name__ == "__main__":
    main()
