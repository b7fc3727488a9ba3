"""Energy and forces, and one training step, of the whole network: time and peak memory against the number of atoms.

python kernels/benchmarks/model_table.py [--neighbours 32] [--output FOLDER]
"""

from __future__ import annotations

import argparse

import torch
from common import Network, System, measure, save
from gate import gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neighbours", type=int, default=32, help="nearest neighbours; 0 for all within 6 Å")
    parser.add_argument("--atoms", type=int, nargs="*", default=[192, 1536, 6144, 24576, 98304])
    parser.add_argument("--train", type=int, nargs="*", default=[1536, 6144])
    parser.add_argument("--precision", default="high", help="highest: strict float32; high: TF32")
    parser.add_argument("--score", default="qk")
    parser.add_argument("--baseline", action="store_true", help="also the edge-materialised PyTorch attention")
    parser.add_argument("--checkpoint", action="store_true", help="recompute every block in the backward pass")
    parser.add_argument("--no-gate", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--name", default="model")
    args = parser.parse_args()
    rows = {} if args.no_gate else {"gate": gate()}
    torch.set_float32_matmul_precision(args.precision)
    forms = {"triton": {"kernel_backend": "triton"}}
    if args.baseline:
        forms["dense"] = {"kernel_backend": "reference", "convolution": "dense"}
    for form, config in forms.items():
        config = config | {"score": args.score, "activation_checkpointing": args.checkpoint}
        model = Network(**config).cuda()
        for atoms in args.train:
            system = System(atoms, args.neighbours or None, "cuda")
            for conserving in (False, True):
                name = f"{form}/train_{'conserving' if conserving else 'direct'}/{atoms}"
                rows[name] = measure(lambda s=system, c=conserving: model.training_step(s, c), 3, 2)
                print(name, rows[name], flush=True)
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        for atoms in args.atoms:
            system = System(atoms, args.neighbours or None, "cuda")
            name = f"{form}/energy_forces/{atoms}"
            rows[name] = measure(lambda s=system: model.energy_forces(s)) | {"edges": system.edges}
            print(name, rows[name], flush=True)
            if "error" in rows[name]:
                break
    save(args.name, rows, args.output)


if __name__ == "__main__":
    main()
