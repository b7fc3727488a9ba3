"""Tile shapes of the attention's kernels against each other: time of every kernel at the paper's widths.

python kernels/benchmarks/tune.py [--atoms 6144] [--precision highest]

With --precision high (TF32), the default, the kernels gather float16 rows, with highest float32 rows.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile
from workload import PAPER, Network, System

from e2former_kernels.common.backend import Mode
from e2former_kernels.equivariant_attention import equivariant_attention, fused
from e2former_kernels.radial.splines import build_splines

#: Constant of fused.py: the kernel whose time it changes, and what to try.
TRIALS = {
    "SCORE_TILE": ("score_kernel", [(32, 1, 1), (32, 1, 2), (32, 1, 4), (64, 1, 1), (64, 2, 4)]),
    "ATTEND_TILE": ("attend_kernel", [(32, 72), (64, 72), (64, 128), (128, 72)]),
    "ATTEND_UNROLL": ("attend_kernel", [1, 2, 4]),
    "BACKWARD_TILE": ("attend_backward_kernel", [(32, 108), (64, 108), (64, 144)]),
    "BACKWARD_EDGES": ("score_backward_kernel", [1, 2, 4]),
    "EACH": ("attend_backward_kernel", [2, 4, 8]),
    "SENDER_TILE": ("sender_kernel", [(32, 72), (64, 72), (64, 144)]),
    "SENDER_UNROLL": ("sender_kernel", [1, 2, 4]),
}
#: Constants that hold one choice for float32 and one for float16 rows.
PAIRS = ("SCORE_TILE", "ATTEND_UNROLL", "BACKWARD_TILE", "BACKWARD_EDGES", "SENDER_TILE", "SENDER_UNROLL")


def kernel_times(run, repeats: int = 3) -> dict[str, float]:
    """ms of every kernel of a call."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1e3 / repeats for e in trace.key_averages() if e.self_device_time_total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, default=6144)
    parser.add_argument("--precision", default="high", choices=("high", "highest"))
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    system = System(args.atoms, 32, "cuda")
    layer = Network(num_layers=1).cuda().freeze().trunk.blocks[0].attention
    heads, width, channels = layer.spec.num_heads, PAPER["head_dim"], PAPER["sphere_channels"]
    query, key = (torch.randn(system.atoms, heads, width, device="cuda").requires_grad_() for _ in range(2))
    value = torch.randn(system.atoms, layer.spec.num_rows, channels, device="cuda").requires_grad_()
    vec = system.graph(system.pos).vec.detach().requires_grad_()
    radial = layer.radial(layer.target_embedding.weight, layer.source_embedding.weight)
    splines = build_splines(radial, layer.spec.envelope.cutoff, system.numbers.unique().tolist())
    inputs = (query, key, value, vec)

    def run() -> None:
        out = equivariant_attention(
            layer.spec, query, key, value, None, vec, system.edge_list(), radial, None, layer.coupling, splines=splines,
            half=args.precision != "highest", mode=Mode(precision=args.precision),
        )  # fmt: skip
        torch.autograd.grad(out.sum(), inputs)

    for constant, (kernel, choices) in TRIALS.items():
        before = getattr(fused, constant)
        for choice in choices:
            setattr(fused, constant, (choice, choice) if constant in PAIRS else choice)
            print(f"{kernel:24s} {constant} = {choice}: {kernel_times(run)[kernel]:.3f} ms", flush=True)
        setattr(fused, constant, before)


if __name__ == "__main__":
    main()
