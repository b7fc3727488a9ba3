"""The pieces of the attention, timed one by one at the paper's widths, and tile shapes against each other.

python kernels/benchmarks/tune.py [--atoms 6144]
"""

from __future__ import annotations

import argparse

import torch
import triton
from common import PAPER, System

import e2former_kernels.common.radial_kernel as radial_kernel
from e2former_kernels.common.plan import edge_plan
from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.equivariant_attention import AttentionSpec, fused
from e2former_kernels.equivariant_attention import primitives as launch
from e2former_kernels.equivariant_attention.fused import FusedAttention


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
    n, rows = system.atoms, 18
    part = rand(n, 3, rows, heads)
    query = rand(n, heads, width)
    pair = rand(edges, heads)
    total = torch.empty_like(query)
    step = FusedAttention(
        AttentionSpec(2, heads, basis, 6.0), 3, [], system.source, system.numbers, None, weights, None
    )
    chunk = edge_plan(system.source, system.target, system.row_ptr, system.order, system.ptr, edges)[0]
    features, _ = network.forward(distance, zt, zs)
    geometry = step._edges(chunk, system.graph(system.pos).vec)
    for tile in ((128, 2), (128, 4), (64, 1), (64, 2), (32, 1)):
        launch.PAIR_TILE = fused.WEIGHTS_TILE = tile
        times = [
            bench(lambda: launch.launch_pair_sum(pair, query, system.source, None, system.row_ptr, total)),
            bench(lambda: launch.launch_pair_sum(pair, query, system.target, system.order, system.ptr, total)),
            bench(lambda: step._attention(chunk, geometry, query, query, features, False)),
            bench(lambda: step._attention(chunk, geometry, query, query, features, True)),
        ]
        print("pair_sum, pair_sum by source, weights, weights kept", tile, [f"{t:.3f}" for t in times], flush=True)
    print("table", bench(lambda: radial_kernel.first_layer_table(weights.basis)))
    print("radial forward", bench(lambda: network.forward(distance, zt, zs)))
    print("radial backward", bench(lambda: network.backward(grad, middle, distance, zt, zs)))
    print("pair_dot", bench(lambda: launch.launch_pair_dot(query, query, system.source, system.row_ptr, pair)))
    print("contract", bench(lambda: launch.launch_contract(rand(20, 27), part.view(n, 27, 256), rand(n, 20, 256))))
    a, b = torch.empty(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    print("copy TB/s", 2 * a.numel() * 4 / bench(lambda: b.copy_(a)) / 1e9)
    a, b = rand(9, n, 256), rand(9, 256, 2048)
    print("bmm TF32 TFLOP/s", 2 * 9 * n * 256 * 2048 / bench(lambda: torch.bmm(a, b)) / 1e9)


if __name__ == "__main__":
    main()
