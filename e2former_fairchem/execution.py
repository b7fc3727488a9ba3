"""How an evaluation runs: chosen once, here. Below this file nobody asks for device, precision or mode (a test looks).

| name | taken when | what runs |
|---|---|---|
| ``reference`` | ``kernel_backend: reference``; ``auto`` without a GPU, in float64, or without kernels | PyTorch |
| ``kernels`` | Triton runs, and weights may change: training, a model that nobody froze | Triton kernels, float32 |
| ``compiled`` | the same inside ``torch.compile`` | the kernels as operations of ``torch.library`` |
| ``frozen`` | ``model.freeze()``, which fairchem's inference calls | and splines for radial networks, merged maps |
| ``frozen_half`` | frozen, and TF32 is allowed | and rows of atoms in float16 with a factor |
| ``replayed`` | frozen, small, the same atoms many times | one of the last two from CUDA graphs (`captured`) |

``dense`` convolutions run in PyTorch in all of them. An execution that is not taken has its reason in
`Execution.why_not`; the first evaluation of each kind says both in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from e2former_fairchem.config import E2FormerV2Config
from e2former_kernels.common.backend import EXACT, Mode, triton_problem
from e2former_kernels.common.chunks import EdgeList
from e2former_kernels.radial.reference import EdgeGeometry, edge_geometry

if TYPE_CHECKING:
    from e2former_fairchem.frozen import Frozen
    from e2former_fairchem.graph import Graph

__all__ = ["EXECUTIONS", "Execution", "choose_execution"]

#: The names of the table.
EXECUTIONS = ("reference", "kernels", "compiled", "frozen", "frozen_half", "replayed")

logger = logging.getLogger("e2former_fairchem")

# Below this many numbers of edge tensors in one layer, keeping them for the backward pass is cheaper than computing
# them twice (64 MB in float32).
KEEP_NUMBERS = 1 << 24

Made = TypeVar("Made")


@dataclass(frozen=True)
class Execution:
    """What the network's modules need to know; see the table above.

    Args:
        name: of the table.
        kernels: Triton computes what has kernels; else the reference does.
        form: of the attention operation: ``relative``, ``sum`` or ``dense``.
        node_factored: the convolution is EAAS, whose nodes need positions.
        recompute: the reference keeps no edge tensors for its backward pass.
        half: rows of atoms are float16 with a factor.
        mode: what the operations with kernels need to know.
        frozen: what is made of the weights, where they are frozen.
        elements: the atomic numbers there are, where weights are frozen.
        recompute_features: of node features keep only what takes more than a norm and a matrix product to recompute.
        replays: repeated evaluations come from CUDA graphs.
        geometry: of the edges, computed once for all layers where the reference keeps edge tensors.
        edges: of the graph, with what calls of operations share.
        why_not: of the executions further down in the table, the reasons.
    """

    name: str = "reference"
    kernels: bool = False
    form: str = "relative"
    node_factored: bool = False
    recompute: bool = False
    half: bool = False
    mode: Mode = EXACT
    frozen: Frozen | None = None
    elements: tuple[int, ...] | None = None
    recompute_features: bool = False
    replays: bool = False
    geometry: EdgeGeometry | None = None
    edges: EdgeList | None = None
    why_not: dict[str, str] = field(default_factory=dict, compare=False)

    def made(self, owner: nn.Module, name: str, make: Callable[[], Made]) -> Made:
        """``make()``, once for frozen weights."""
        return make() if self.frozen is None else self.frozen.made(owner, name, make)

    def on(self, config: E2FormerV2Config, graph: Graph, edges: EdgeList) -> Execution:
        """The same on a graph and its edges, with what its layers share."""
        if self.kernels:
            return replace(self, edges=edges)
        numbers = graph.num_edges * 6 * (config.lmax + 1) ** 2 * config.sphere_channels
        recompute = {"auto": numbers > KEEP_NUMBERS, "dense": False}.get(config.convolution, True)
        if recompute:
            return replace(self, edges=edges, recompute=True)
        geometry = edge_geometry(graph.vec, config.num_radial_basis, config.envelope)
        return replace(self, edges=edges, geometry=geometry)

    def on_long_range(self, edges: EdgeList) -> Execution:
        """The same on the long-range graph, whose networks have no splines."""
        return replace(self, elements=None, recompute_features=False, geometry=None, edges=edges)


REFERENCE = Execution()


def takes_kernels(config: E2FormerV2Config, like: Tensor) -> bool:
    """Whether kernels compute a network: ``triton``, or ``auto`` in float32 on a GPU that they run on.

    Args:
        config: of the network, whose score and norm must have kernels.
        like: a weight, for device and dtype.

    Raises:
        RuntimeError: ``kernel_backend: triton`` cannot run here, or not this network.
    """
    backend, problem = config.kernel_backend, config.refusal or triton_problem(like.device)
    if backend == "triton" and problem is not None:
        raise RuntimeError(f"kernel_backend=triton: {problem}")
    wanted = like.device.type == "cuda" and like.dtype != torch.float64 if backend == "auto" else backend == "triton"
    return wanted and problem is None


def choose_execution(
    config: E2FormerV2Config,
    graph: Graph,
    like: Tensor,
    module: nn.Module,
    frozen_weights: Callable[[Sequence[nn.Parameter]], tuple[Frozen, tuple[int, ...]]] | None,
) -> Execution:
    """How an evaluation of ``graph`` runs.

    Args:
        config: of the network.
        graph: the short-range graph.
        like: a weight, for device and dtype.
        module: the network. Its parameters are asked only where they matter, as the next.
        frozen_weights: what is made of the weights and the elements there are; None: nobody froze them.

    Raises:
        RuntimeError: ``kernel_backend: triton`` cannot run here.
    """
    forms = {"dense": "dense", "eaas": "sum"}
    device = like.device
    given = {
        "kernels": takes_kernels(config, like),
        "form": forms.get(config.convolution, "relative"),
        "node_factored": config.convolution == "eaas",
    }
    if not given["kernels"]:
        return _said(Execution(**given, why_not={"kernels": _no_kernels(config, like)}))
    weights, compiled = _parameters_of(module), torch.compiler.is_compiling()
    learn = any(p.requires_grad for p in weights)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    mode = Mode(learn and torch.is_grad_enabled(), compiled, torch.get_float32_matmul_precision(), autocast)
    given["mode"] = mode
    if compiled:
        return Execution("compiled", **given)
    if learn or frozen_weights is None:
        reason = "nobody called freeze()" if frozen_weights is None else "weights ask for gradients"
        return _said(Execution("kernels", **given, why_not={"frozen": reason}))
    frozen, elements = frozen_weights(weights)
    recompute = not config.activation_checkpointing and graph.halo is None
    given |= {"frozen": frozen, "elements": elements, "recompute_features": recompute}
    no_half = _first(
        (mode.precision == "highest", "products in TF32 are not allowed"),
        (like.dtype != torch.float32, f"weights are {like.dtype}"),
        (graph.vec.dtype != torch.float32, f"edge vectors are {graph.vec.dtype}"),
        (autocast is not None, "autocast is on"),
    )
    no_replay = _first(
        (not config.cuda_graph, "cuda_graph is false"),
        (not graph.vec.is_cuda, f"the edges are on {graph.vec.device}"),
        (graph.vec.dtype != torch.float32, f"edge vectors are {graph.vec.dtype}"),
        (graph.halo is not None, "graph parallelism exchanges features"),
        (graph.num_edges == 0, "there are no edges"),
        (given["form"] != "relative", f"convolution is {config.convolution}"),
        (config.long_range is not None, "there are long-range blocks"),
        (autocast is not None, "autocast is on"),
        (graph.vec.is_cuda and torch.cuda.is_current_stream_capturing(), "a CUDA graph is being captured"),
    )
    reasons = {"frozen_half": no_half, "replayed": no_replay}
    why_not = {name: reason for name, reason in reasons.items() if reason is not None}
    name = "frozen" if no_half else "frozen_half"
    return _said(Execution(name, half=no_half is None, replays=no_replay is None, why_not=why_not, **given))


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters, in an order of their own: a walk without names, which takes most of the time."""
    found, modules = [], [module]
    while modules:
        here = modules.pop()
        if here is not None:
            found += here._parameters.values()
            modules += here._modules.values()
    return [parameter for parameter in found if parameter is not None]


def _first(*reasons: tuple[bool, str]) -> str | None:
    return next((reason for holds, reason in reasons if holds), None)


def _no_kernels(config: E2FormerV2Config, like: Tensor) -> str:
    if config.kernel_backend == "reference":
        return "kernel_backend is reference"
    if config.refusal is not None:
        return config.refusal
    return "float64 is the reference's" if like.dtype == torch.float64 else f"weights are on {like.device}"


@torch.compiler.disable
def _said(execution: Execution) -> Execution:
    if logger.isEnabledFor(logging.INFO):
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in execution.why_not.items())
        _say(f"execution: {execution.name}" + (f" ({reasons})" if reasons else ""))
    return execution


_said_lines: set[str] = set()


def _say(line: str) -> None:
    if line not in _said_lines:
        _said_lines.add(line)
        logger.info(line)
