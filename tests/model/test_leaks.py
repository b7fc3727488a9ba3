"""Nothing of an evaluation outlives what the caller holds of it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from ase.build import bulk, molecule
from torch import Tensor

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.testing import atomic_data
from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.chunks import EdgeList

SMALL = {"lmax": 1, "sphere_channels": 8, "num_layers": 1, "num_heads": 4, "head_dim": 2, "num_radial_basis": 8}
SYSTEMS = {
    "pair": [molecule("H2")],
    "molecule": [molecule("H2O")],
    "crystal": [bulk("Cu", "fcc", 3.6)],
    "both": [molecule("H2O"), bulk("Cu")],
}
REFERENCE, TRITON = ({"kernel_backend": name} for name in ("reference", "triton"))
LONG_RANGE = {"convolution": "auto", "long_range": {"layers": 1, "lower": 2.0, "upper": 4.0, "envelope": "bell"}}
FORMS = [
    *((kind, REFERENCE | {"convolution": c}) for kind in ("forces", "training") for c in ("auto", "eaas", "dense")),
    ("hessian", REFERENCE | {"convolution": "on_the_fly"}),
    ("training", REFERENCE | LONG_RANGE),
    *((kind, TRITON) for kind in ("forces", "training", "hessian")),
    ("forces", TRITON | {"convolution": "eaas"}),
]


def left_over(evaluate: Callable[[], None], before: int = 1) -> dict[str, int]:
    """How many graphs, edge lists and tensors one more call leaves behind."""

    def count() -> dict[str, int]:
        gc.collect()
        objects = gc.get_objects()
        kinds = {"graphs": Graph, "edge lists": EdgeList, "tensors": Tensor}
        return {name: sum(issubclass(type(o), kind) for o in objects) for name, kind in kinds.items()}

    for _ in range(before):  # constants, and what is made when elements come a second time
        evaluate()
    known = count()
    evaluate()
    return {name: number - known[name] for name, number in count().items()}


def graph_of(systems: str, pos: Tensor | None = None, cell_grad: bool = False) -> tuple[dict, Graph]:
    data = atomic_data(SYSTEMS[systems], torch.float32)
    data["pos"].requires_grad_()
    data["cell"].requires_grad_(cell_grad)
    keys = ("pos", "cell", "pbc", "batch", "natoms")
    return data, build_graph(*(data[key] for key in keys), 3.0)


@pytest.mark.parametrize("systems", ["molecule", "crystal", "both"])
@pytest.mark.parametrize("cell_grad", [False, True])
def test_graphs_with_gradients(systems: str, cell_grad: bool) -> None:
    assert not any(left_over(lambda: graph_of(systems, cell_grad=cell_grad)).values())


def test_given_edges() -> None:
    def evaluate() -> None:
        data, graph = graph_of("molecule")
        given = {"edge_index": torch.stack([graph.source, graph.target])}
        keys = ("pos", "cell", "pbc", "batch", "natoms")
        build_graph(*(data[key] for key in keys), 3.0, **given).vec.sum().backward()

    assert not any(left_over(evaluate).values())


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_evaluations(kind: str, form: dict) -> None:
    """Forces, training steps with second derivatives, and a row of a Hessian, frozen and not."""
    if form["kernel_backend"] == "triton" and (torch.cuda.is_available() or not triton_installed()):
        pytest.skip("runs in Triton's interpreter, without a GPU")
    torch.manual_seed(0)
    trunk = E2FormerV2(E2FormerV2Config(**(SMALL | {"cutoff": 3.0, "max_num_elements": 30} | form)))
    if kind != "training":
        trunk.freeze()

    def evaluate() -> None:
        data, graph = graph_of("pair" if form["kernel_backend"] == "triton" else "both")
        long_graph = None
        if trunk.long_range is not None:
            keys = ("pos", "cell", "pbc", "batch", "natoms")
            long_graph = build_graph(*(data[key] for key in keys), 4.0, lower=2.0)
        system = torch.zeros(len(data["natoms"]), dtype=torch.long)
        atoms = data["atomic_numbers"].long(), system, system + 1, data["batch"], data["pos"]
        x = trunk(*atoms, graph, long_graph).square().sum()
        (forces,) = torch.autograd.grad(x, data["pos"], create_graph=kind != "forces")
        if kind == "training":
            trunk.zero_grad()
            forces.square().sum().backward()
            trunk.zero_grad()
        elif kind == "hessian":
            torch.autograd.grad(forces[0, 0], data["pos"])

    assert not any(left_over(evaluate, before=1 if kind == "training" else 2).values())
