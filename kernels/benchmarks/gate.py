"""The correctness gate of the benchmarks: a red gate prints no timing."""

from __future__ import annotations

import sys

import torch
from common import Network, System, relative_error


def check_network(precision: str, tolerance: float, atoms: int = 96, **config) -> dict:
    """Energy, forces and training gradients with Triton against the float64 reference on the same weights."""
    torch.set_float32_matmul_precision(precision)
    found = {}
    model = Network(kernel_backend="triton", **config).cuda()
    reference = Network(kernel_backend="reference", **config).double().cuda()
    reference.load_state_dict(model.state_dict())
    system, exact = System(atoms, 32, "cuda"), System(atoms, 32, "cuda", torch.float64)
    energy, forces = model.energy_forces(system)
    energy64, forces64 = reference.energy_forces(exact)
    found["energy"] = abs(float(energy) / float(energy64) - 1)
    found["forces"] = relative_error(forces, forces64)
    again = model.energy_forces(system)
    found["same_bits"] = bool((again[1] == forces).all())
    model.training_step(system)
    reference.training_step(exact)
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    pairs = [(p, q) for p, q in pairs if q is not None and float(q.norm()) > 0]
    found["training"] = relative_error(
        torch.cat([p.double().flatten() for p, _ in pairs]), torch.cat([q.flatten() for _, q in pairs])
    )
    found["ok"] = all(found[k] < tolerance for k in ("energy", "forces", "training")) and found["same_bits"]
    return found


def gate() -> dict:
    """Strict float32 and TF32; exits when a check is red."""
    found = {}
    for precision, tolerance in (("highest", 1e-4), ("high", 3e-2)):
        for norm in ("smooth", "molfm_v1_5"):
            found[f"{precision}/{norm}"] = check_network(precision, tolerance, attention_norm=norm)
    for name, row in found.items():
        print("gate", name, row, flush=True)
    if not all(row["ok"] for row in found.values()):
        print("gate: red, no timings", flush=True)
        sys.exit(1)
    return found
