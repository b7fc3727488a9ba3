"""Where the time of one energy-and-forces evaluation or training step goes: kernels by total time.

python kernels/benchmarks/profile_model.py --atoms 6144 [--train]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats

import torch
from torch.profiler import ProfilerActivity, profile
from workload import Network, System


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, default=6144)
    parser.add_argument("--neighbours", type=int, default=32)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--precision", default="high")
    parser.add_argument("--python", action="store_true", help="where Python's own time goes, instead")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    model = Network(kernel_backend="triton").cuda()
    system = System(args.atoms, args.neighbours or None, "cuda")
    if not args.train:
        model.freeze()
    run = (lambda: model.training_step(system)) if args.train else (lambda: model.energy_forces(system))
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    if args.python:
        tracer = cProfile.Profile()
        tracer.enable()
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        tracer.disable()
        pstats.Stats(tracer).sort_stats("tottime").print_stats(args.rows)
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    events = [e for e in prof.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    print(f"{args.atoms} atoms, train={args.train}: GPU {total / 1e3:.2f} ms in {sum(e.count for e in events)} kernels")
    for e in events[: args.rows]:
        print(f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:5d} x  {e.key[:110]}")


if __name__ == "__main__":
    main()
