"""The pieces of the attention, timed one by one at the paper's widths, and tile shapes against each other.

    python kernels/benchmarks/tune.py [--atoms 6144]
"""

from __future__ import annotations

import argparse

import torch
import triton
from common import PAPER, System

import e2former_kernels.common.radial_kernel as radial_kernel
from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.common.tiles import RowTiles
from e2former_kernels.equivariant_attention import primitives as launch


def bench(function) -> float:
    return triton.testing.do_bench(function, warmup=3, rep=12, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, default=6144)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    system = System(args.atoms, 32, "cuda")
    heads, width, hidden, basis = 128, 8, 128, PAPER["num_radial_basis"]
    edges = system.edges
    rand = lambda *shape: torch.randn(*shape, device="cuda") * 0.1  # noqa: E731
    distance = system.graph(system.pos).vec.norm(dim=-1)
    zt, zs = system.numbers[system.target], system.numbers[system.source]
    shapes = [(1, hidden, basis), (119, 1, hidden), (119, 1, hidden), (1, hidden), (1, hidden), (1, hidden, hidden)]
    shapes += [(1, hidden), (1, hidden), (1, hidden), (1, 2 * heads, hidden), (1, 2 * heads)]
    weights = RadialWeights(*(rand(*s) for s in shapes))
    grad = rand(edges, 1, 2 * heads)
    network = radial_kernel.RadialNetwork(weights, 6.0)
    _, middle = network.forward(distance, zt, zs)
    print("table", bench(lambda: radial_kernel.first_layer_table(weights.basis)))
    print("radial forward", bench(lambda: network.forward(distance, zt, zs)))
    print("radial backward", bench(lambda: network.backward(grad, middle, distance, zt, zs)))
    n, rows = system.atoms, 18
    value, part = rand(n, rows, heads), rand(n, 3, rows, heads)
    weight, scale, dots = rand(edges, heads), rand(edges, 3), rand(edges, 3, heads)
    out, back = torch.empty_like(part), torch.empty_like(value)
    for block in (32, 64, 128):
        for warps in (1, 2, 4, 8):
            numbers = rows * block / (32 * warps)
            if not 12 <= numbers <= 48:
                continue
            launch.row_tiles = lambda *a, b=block, w=warps: RowTiles(16, 2, b, w)
            times = [
                bench(lambda: launch.launch_aggregate(weight, scale, value, system.source, system.row_ptr, out)),
                bench(lambda: launch.launch_message_dot(value, part, system.source, system.row_ptr, dots)),
                bench(
                    lambda: launch.launch_aggregate_transposed(
                        weight, scale, part, system.target, system.order, system.ptr, back
                    )
                ),
            ]
            print("aggregate, dot, transposed", block, warps, [f"{t:.3f}" for t in times], flush=True)
    query = rand(n, heads, width)
    pair = rand(edges, heads)
    total = torch.empty_like(query)
    print("pair_sum", bench(lambda: launch.launch_pair_sum(pair, query, system.source, None, system.row_ptr, total)))
    print("pair_dot", bench(lambda: launch.launch_pair_dot(query, query, system.source, system.row_ptr, pair)))
    print("contract", bench(lambda: launch.launch_contract(rand(20, 27), part.view(n, 27, 256), rand(n, 20, 256))))
    a, b = torch.empty(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    print("copy TB/s", 2 * a.numel() * 4 / bench(lambda: b.copy_(a)) / 1e9)
    a, b = rand(9, n, 256), rand(9, 256, 2048)
    print("bmm TF32 TFLOP/s", 2 * 9 * n * 256 * 2048 / bench(lambda: torch.bmm(a, b)) / 1e9)


if __name__ == "__main__":
    main()
