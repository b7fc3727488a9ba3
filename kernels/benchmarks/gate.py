"""The correctness gate of the benchmarks: a red gate prints no timing.

Triton kernels in float32 against the reference in float64 with the same weights, each score in strict float32 and TF32:
energy, forces (also after repeated evaluations with frozen weights, which take radial networks from splines and
replay CUDA graphs), gradients of the conserving loss (second derivatives) and of the direct one by all weights,
and the same bits from two runs.

python kernels/benchmarks/gate.py [--output FOLDER]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from workload import TINY, Network, Results, System, common_arguments, free, relative_error

#: Largest relative errors in strict float32 and with TF32: three times what the worst network has on an H100
#: (``results/gate.json``).
LIMITS = {
    "highest": {
        "energy": 2.2e-6, "forces": 2.5e-5, "forces_frozen": 2.7e-5, "training": 1.4e-5, "training_worst": 5.6e-5,
        "training_direct": 1.3e-6, "training_direct_worst": 1.5e-5,
    },
    "high": {
        "energy": 5.8e-3, "forces": 5e-3, "forces_frozen": 5e-3, "training": 7.8e-3, "training_worst": 1.3e-2,
        "training_direct": 3.4e-3, "training_direct_worst": 8.1e-3,
    },
}  # fmt: skip
#: (score, norm) of the networks checked.
NETWORKS = (("qk", "smooth"), ("qk", "molfm_v1_5"), ("qk_dot", "smooth"), ("qk_dot_scalar", "smooth"))
EVALUATIONS = 5


def gradients(model: Network, system: System, conserving: bool) -> list[Tensor | None]:
    """Gradients of one training step by the weights, in order."""
    model.training_step(system, conserving)
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def compare_gradients(found: list[Tensor | None], exact: list[Tensor | None]) -> tuple[float, float]:
    """Relative error of all gradients as one vector, and the worst one of a weight that matters.

    A weight matters when its gradient has at least a hundredth of the largest gradient's norm: smaller ones are
    differences of large numbers.
    """
    pairs = [(p, q) for p, q in zip(found, exact, strict=True) if q is not None and float(q.norm()) > 0]
    together = relative_error(
        torch.cat([p.double().flatten() for p, _ in pairs]), torch.cat([q.flatten() for _, q in pairs])
    )
    largest = max(float(q.norm()) for _, q in pairs)
    worst = max(relative_error(p, q) for p, q in pairs if float(q.norm()) > 1e-2 * largest)
    return together, worst


def measure_network(precision: str, atoms: int = 96, device: str = "cuda", **config) -> dict:
    """Figures of one network against the reference; see the module."""
    torch.set_float32_matmul_precision(precision)
    model = Network(kernel_backend="triton", **config).to(device)
    reference = Network(kernel_backend="reference", **config).double().to(device)
    reference.load_state_dict(model.state_dict())
    system, exact = System(atoms, 32, device), System(atoms, 32, device, torch.float64)
    energy, forces = model.energy_forces(system)
    energy64, forces64 = reference.energy_forces(exact)
    found: dict = {"energy": relative_error(energy.detach(), energy64.detach())}
    found["forces"] = relative_error(forces, forces64)
    found["same_bits"] = bool((model.energy_forces(system)[1] == forces).all())
    for name, conserving in (("training", True), ("training_direct", False)):
        trained, again = (gradients(model, system, conserving) for _ in range(2))
        found["same_bits"] &= all(p is None or torch.equal(p, q) for p, q in zip(trained, again, strict=True))
        pair = compare_gradients(trained, gradients(reference, exact, conserving))
        found[name], found[f"{name}_worst"] = pair
    model.freeze()
    for _ in range(EVALUATIONS):
        _, frozen = model.energy_forces(system)
    found["forces_frozen"] = relative_error(frozen, forces64)
    return found


def judge(name: str, found: dict, precision: str) -> dict:
    """Row of a network of which this is measured, printed: the limits beside it, and which figures are over theirs."""
    limits = LIMITS[precision]
    over = [k for k, limit in limits.items() if not found[k] < limit]
    row = found | {"limits": limits, "over": over, "ok": not over and found["same_bits"]}
    figures = ", ".join(f"{k} {v:.1e}" for k, v in found.items() if isinstance(v, float))
    verdict = "ok " if row["ok"] else f"RED (over the limits: {', '.join(over) or 'none'})"
    print(f"gate {verdict} {name}: {figures}, same bits {found['same_bits']}", flush=True)
    return row


def stop_at_red(rows: dict[str, dict]) -> None:
    """Exit where a row is not ok."""
    if not all(row["ok"] for row in rows.values()):
        print("gate: red, no timings", flush=True)
        sys.exit(1)


def gate(device: str = "cuda", tiny: bool = False, scores: tuple[str, ...] | None = None) -> dict:
    """All networks, or those of the scores named; exits when a check is red. Leaves the precision as it was.

    tiny: two molecules, strict float32, one network, which is what Triton's interpreter has time for.
    """
    before, found = torch.get_float32_matmul_precision(), {}
    widths, atoms = (TINY, 6) if tiny else ({}, 96)
    for precision in ("highest",) if tiny else LIMITS:
        for score, norm in NETWORKS[:1] if tiny else NETWORKS:
            if scores is not None and score not in scores:
                continue
            name = f"{precision}/{score}/{norm}"
            measured = measure_network(precision, atoms, device, score=score, attention_norm=norm, **widths)
            found[name] = judge(name, measured, precision)
            free()
    torch.set_float32_matmul_precision(before)
    stop_at_red(found)
    return found


def main() -> None:
    args = common_arguments(__doc__, "gate").parse_args()
    results = Results(args.name, args.output)
    results.update(gate(args.device, args.tiny))
    results.add("all", {"ok": True})


if __name__ == "__main__":
    main()
