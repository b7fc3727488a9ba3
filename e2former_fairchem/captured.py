"""The trunk as CUDA graphs: for small systems Python's launches cost more than the kernels that they launch.

Steps of molecular dynamics and relaxations evaluate the same atoms many times, with a neighbour list that changes.
A CUDA graph replays fixed kernels on fixed memory, so the list is padded to a capacity by edges of padding atoms, which
make a system of their own: to the network it is one more molecule of the batch, and nothing reads its features. Forward
and backward are one graph each. Derivatives that a replay cannot give (second ones, or of an evaluation whose
activations have been overwritten by a later one) run without graphs, on the same padded list.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e2former_fairchem.graph import Graph
from e2former_fairchem.segments import Transposed
from e2former_kernels.common.chunks import SeveralChunks
from e2former_kernels.compat import foreach_copy_

if TYPE_CHECKING:
    from e2former_fairchem.execution import Execution
    from e2former_fairchem.model import E2FormerV2

__all__ = ["Atoms", "Replays", "padded_capacity"]

#: Evaluations of the same atoms in a row before they are captured, which costs as much as several evaluations: a sweep
#: over many molecules never captures.
EVALUATIONS_BEFORE = 3
#: Captures kept, the least recently used goes first: each holds the memory of one evaluation.
MAX_CAPTURES = 2
#: Share of the edges kept free for lists that grow.
SPARE = 1 / 24
#: A capture with more room than this many times the edges is made anew.
MAX_SPARE = 1.2


class Atoms(NamedTuple):
    """What the trunk reads beside the graph: [N], [B], [B], [N]."""

    atomic_numbers: Tensor
    charge: Tensor
    spin: Tensor
    batch: Tensor


class Padding(NamedTuple):
    """Room for a graph of ``edges`` edges, and the padding atoms that take what a list leaves free."""

    edges: int
    atoms: int


def padded_capacity(nodes: int, edges: int) -> Padding:
    """Capacity for lists of about ``edges`` edges; a padding atom gets at most about twice a real one's neighbours."""
    spare = int(edges * SPARE) + 32
    degree = max(2 * edges // max(nodes, 1), 32)
    return Padding(edges + spare, -(-int(MAX_SPARE * spare) // degree))


class PaddedInputs:
    """Fixed memory for atoms and graphs of up to a capacity, filled anew by :meth:`fill` before every replay.

    element: of the padding atoms.
    """

    def __init__(self, atoms: Atoms, graph: Graph, padding: Padding, element: int = 1) -> None:
        device, nodes, systems = graph.vec.device, graph.num_nodes, atoms.charge.numel()
        self.nodes, self.padding, self.cutoff = nodes, padding, graph.cutoff
        total = nodes + padding.atoms

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        self.atoms = Atoms(
            integers(total, value=element), integers(systems + 1), integers(systems + 1), integers(total, value=systems)
        )
        self.source, self.target, self.order = (integers(padding.edges) for _ in range(3))
        self.row_ptr, self.source_ptr = integers(total + 1), integers(total + 1)
        self.vec = graph.vec.new_zeros(padding.edges, 3)
        self.edge_number = torch.arange(padding.edges, device=device)
        self.rest = graph.vec.new_tensor([0.5 * graph.cutoff, 0.0, 0.0]).repeat(padding.edges, 1)

    def fill(self, atoms: Atoms, graph: Graph) -> None:
        """Copy a graph of at most the capacity; the padding atoms share out the remaining edges in order.

        Three launches, however many pieces there are: the host's time counts here.
        """
        nodes, edges = self.nodes, graph.num_edges
        free, padding_atoms = self.padding.edges - edges, self.padding.atoms
        # edge p of the free ones joins padding atom floor(p K / free) to itself
        owner = np.arange(free) * padding_atoms // max(free, 1) + nodes
        last = -(-np.arange(1, padding_atoms + 1) * free // padding_atoms) + edges
        rest = torch.from_numpy(np.concatenate([owner, last])).to(self.source.device, non_blocking=True)
        owner, last = rest[:free], rest[free:]
        integers = [(mine[: given.shape[0]], given) for mine, given in zip(self.atoms, atoms, strict=True)]
        for mine, given, tail in (
            (self.source, graph.source, owner),
            (self.target, graph.target, owner),
            (self.order, graph.source_order, self.edge_number[edges:]),
        ):
            integers += [(mine[:edges], given), (mine[edges:], tail)]
        for mine, given in ((self.row_ptr, graph.row_ptr), (self.source_ptr, graph.source_ptr)):
            integers += [(mine[: nodes + 1], given), (mine[nodes + 1 :], last)]
        vectors = [(self.vec[:edges], graph.vec.detach()), (self.vec[edges:], self.rest[edges:])]
        for pieces in (integers, vectors):
            foreach_copy_(*map(list, zip(*pieces, strict=True)))

    def graph(self, vec: Tensor) -> Graph:
        """The padded graph, with the edge vectors given."""
        total = self.nodes + self.padding.atoms
        return Graph(
            self.source,
            self.target,
            vec,
            None,
            None,
            self.row_ptr,
            self.cutoff,
            total,
            senders=Transposed(self.source, total, self.order, self.source_ptr),
            one_chunk=True,
        )


class _Capture:
    """Graphs of one evaluation and of its gradient by the edge vectors."""

    def __init__(self, trunk: E2FormerV2, atoms: Atoms, graph: Graph, execution: Execution, gradient: bool) -> None:
        padding = padded_capacity(graph.num_nodes, graph.num_edges)
        self.inputs = PaddedInputs(atoms, graph, padding, execution.elements[0])
        self.inputs.fill(atoms, graph)
        self.replays = 0  # of either graph: each writes over what the one before has left
        vec = self.inputs.vec.requires_grad_(gradient)
        # copies of the vectors' Python object share its storage, which is what fill() writes to
        self.inputs.vec = vec.detach()
        self.out_grad: Tensor | None = None
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

        def evaluate() -> Tensor:
            return trunk.evaluate(self.inputs.atoms, self.inputs.graph(vec), execution=execution)

        with torch.set_grad_enabled(gradient):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels, creates handles
                for _ in range(2):
                    out = evaluate()
                    if gradient:
                        torch.autograd.grad(out, vec, torch.ones_like(out))
                del out
            torch.cuda.current_stream().wait_stream(side)
            self.splines = execution.frozen.all_splines()  # replays read them
            with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
                out = evaluate()
            if gradient:
                self.out_grad = torch.zeros_like(out)
                with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode="thread_local"):
                    (self.vec_grad,) = torch.autograd.grad(out, vec, self.out_grad)
        self.out = out.detach()

    def fits(self, edges: int) -> bool:
        return edges <= self.inputs.padding.edges <= MAX_SPARE * edges + 64

    def run(self, atoms: Atoms, graph: Graph) -> Tensor:
        self.replays += 1
        self.inputs.fill(atoms, graph)
        self.forward.replay()
        return self.out[: graph.num_nodes].clone()

    def gradient(self, grad: Tensor, edges: int) -> Tensor:
        """Once after :meth:`run`, whose activations it uses up."""
        self.replays += 1
        self.out_grad[: grad.shape[0]].copy_(grad)  # those of padding atoms stay zero
        self.backward.replay()
        return self.vec_grad[:edges].clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, capture: _Capture, evaluate: Callable[[Tensor], Tensor], atoms: Atoms, graph: Graph, vec: Tensor):
        ctx.capture, ctx.evaluate = capture, evaluate
        out = capture.run(atoms, graph)
        ctx.replays = capture.replays
        ctx.save_for_backward(vec)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (vec,) = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if not create_graph and ctx.replays == ctx.capture.replays:
            return None, None, None, None, ctx.capture.gradient(grad, vec.shape[0])
        with torch.enable_grad():
            if not vec.requires_grad:
                vec = vec.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.evaluate(vec), vec, grad, create_graph=create_graph)
        return None, None, None, None, found


class Replays:
    """Captures of a trunk with frozen weights, by atoms and by what they depend on.

    capture: makes one; raises SeveralChunks for too many edges, RuntimeError where no other is to be tried.
    """

    def __init__(self, capture: Callable[[E2FormerV2, Atoms, Graph, Execution, bool], _Capture] = _Capture) -> None:
        self._capture = capture
        self._captures: dict[tuple, _Capture] = {}
        self._last: tuple | None = None  # what was evaluated last, and how often in a row
        self._times = 0
        self._too_large: dict[tuple, int] = {}  # edges with which a capture was refused
        self._refused: str | None = None

    def __call__(self, trunk: E2FormerV2, atoms: Atoms, graph: Graph, execution: Execution) -> Tensor | None:
        """Node features from a replay; None while these atoms have not come up often enough, or are too many."""
        if self._refused is not None:
            return None
        gradient = graph.vec.requires_grad and torch.is_grad_enabled()
        shape = (graph.num_nodes, atoms.charge.numel(), graph.vec.device)
        key = (*shape, execution.elements, gradient, execution.name, execution.mode)
        capture = self._captures.pop(key, None)
        if capture is None or not capture.fits(graph.num_edges):
            del capture  # its memory serves the next one
            self._times = self._times + 1 if key == self._last else 1
            self._last = key
            too_large = graph.num_edges > 0.9 * self._too_large.get(key, math.inf)
            if self._times < EVALUATIONS_BEFORE or too_large:
                return None
            while len(self._captures) >= MAX_CAPTURES:
                self._captures.pop(next(iter(self._captures)))
            try:
                capture = self._capture(trunk, atoms, graph, execution, gradient)
            except SeveralChunks:
                self._too_large[key] = graph.num_edges  # launches do not matter there
                return None
            except RuntimeError as error:
                self._refused = str(error)
                logging.warning(f"e2former_v2: cuda_graph is switched off, capturing failed: {error}")
                return None
        self._captures[key] = capture

        def evaluate(vec: Tensor) -> Tensor:
            # padded as the replay was: what rounds differently gives another function's derivatives
            inputs = PaddedInputs(atoms, graph, capture.inputs.padding, execution.elements[0])
            inputs.fill(atoms, graph)
            padded = torch.cat([vec, inputs.rest[graph.num_edges :]])
            return trunk.evaluate(inputs.atoms, inputs.graph(padded), execution=execution)[: graph.num_nodes]

        return _Replay.apply(capture, evaluate, atoms, graph, graph.vec)
