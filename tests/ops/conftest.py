"""Inputs of the operations at toy sizes: float64, an atom without neighbours, weights that are not symmetric."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # before triton is first imported, which is when this file is read
    os.environ.setdefault("TRITON_INTERPRET", "1")

from e2former_kernels.common.backend import Mode
from e2former_kernels.common.chunks import EdgeList
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.equivariant_attention import AttentionSpec, DotWeights
from e2former_kernels.equivariant_attention.score import SCORES
from e2former_kernels.radial.reference import RadialWeights

ELEMENTS = 4
PATHS = {1: 4, 2: 9, 3: 16, 4: 25}  # rows of a made-up coupling: the kernels know nothing of its structure


@pytest.fixture(autouse=True)
def poison_uninitialised() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def as_in_large_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs sum over several tiles, and atoms come in several chunks: the interpreter takes minutes for as many.

    Of all tests this alone knows what decides it. Tiles stay as they are: `several_tiles` has sizes beyond them.
    """
    from e2former_kernels.common.chunks import node_chunks
    from e2former_kernels.equivariant_attention import score_directional as gate
    from e2former_kernels.feedforward import op as feedforward
    from e2former_kernels.layer_norm import op as norm
    from e2former_kernels.query_key import half, op
    from e2former_kernels.radial import network

    for module, name, value in (
        *((module, "MAX_PROGRAMS", 2) for module in (gate, network, norm, op)),
        *((module, "chunks", lambda nodes, *_: node_chunks(nodes, 3)) for module in (half, op)),
        (feedforward, "node_chunks", lambda nodes: node_chunks(nodes, 3)),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def several_tiles() -> dict[str, int]:
    """Sizes of an attention that no program of its kernels covers: heads, columns of the gate, edges of a layer."""
    from e2former_kernels.equivariant_attention import fused, second
    from e2former_kernels.equivariant_attention import score_directional as gate
    from e2former_kernels.radial import network

    tiles = [tile for module in (fused, second) for name, tile in vars(module).items() if name.endswith("_TILE")]
    widths = [one[0] for tile in tiles for one in (tile if isinstance(tile[0], tuple) else [tile])]
    edges = 37
    hidden = max(network.TILE_NUMBERS, network.ALONE_NUMBERS) // (edges - 1) + 1
    return {"heads": max(widths) + 1, "basis": gate.TILE[0] + 1, "edges": edges, "hidden": hidden}


@dataclass
class Make:
    """Random tensors of one dtype on one device."""

    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64) * scale
        return x.to(self.device, self.dtype).requires_grad_()

    def radial(self, groups: int, outputs: int, hidden: int, basis: int, norms: bool = True) -> RadialWeights:
        """Weights of ``groups`` radial networks."""
        norm = [self(groups, hidden, scale=0.5) if norms else None for _ in range(4)]
        return RadialWeights(
            self(groups, hidden, basis, scale=0.5),
            self(ELEMENTS, groups, hidden, scale=0.5),
            self(ELEMENTS, groups, hidden, scale=0.5),
            norm[0],
            norm[1],
            self(groups, hidden, hidden, scale=0.5),
            self(groups, hidden, scale=0.5),
            norm[2],
            norm[3],
            self(groups, outputs, hidden, scale=0.5),
            self(groups, outputs, scale=0.5),
        )

    def edges(self, nodes: int, edges: int, chunk: int | None = None) -> tuple[Tensor, EdgeList]:
        """vec and the edges, in chunks of at most ``chunk``; atom 1 (if there is one) receives nothing."""
        target = torch.randint(0, nodes, (edges,))
        target = torch.where(target == 1, torch.zeros_like(target), target).sort().values.to(self.device)
        source = torch.randint(0, nodes, (edges,)).to(self.device)
        row_ptr = torch.searchsorted(target, torch.arange(nodes + 1, device=self.device))
        species = torch.randint(0, ELEMENTS, (nodes,)).to(self.device)
        return self(edges, 3), EdgeList(source, target, row_ptr, species, max_edges=chunk)

    @staticmethod
    def in_chunks(arguments: Sequence, chunk: int | None) -> list:
        """The same arguments, of an operation on edges, with edges in chunks of at most ``chunk``."""
        return [
            EdgeList(a.source, a.target, a.row_ptr, a.species, max_edges=chunk) if isinstance(a, EdgeList) else a
            for a in arguments
        ]

    def attention(
        self,
        score: str = "qk",
        norm: str = "smooth",
        order: int = 1,
        lmax: int = 1,
        nodes: int = 4,
        edges: int = 7,
        heads: int = 3,
        width: int = 2,
        per_head: int = 2,
        basis: int = 5,
        hidden: int = 4,
        envelope: Envelope = Envelope(3.0),  # noqa: B008
        chunk: int | None = None,
        **options,
    ) -> tuple:
        """Positional arguments of ``equivariant_attention``."""
        spec = AttentionSpec(
            lmax=lmax,
            num_heads=heads,
            num_basis=basis,
            envelope=envelope,
            score=score,
            norm=norm,
            order=order,
            **options,
        )
        rows = (lmax + 1) ** 2
        vec, edges = self.edges(nodes, edges, chunk)
        dot = dot_weights = None
        if score == "qk_dot":
            dot = self(nodes, rows, basis)
            columns = (lmax + 1) * basis
            dot_weights = DotWeights(self.radial(1, columns, hidden, basis), self(heads, columns), self(heads))
        elif score == "qk_dot_scalar":
            dot = self(nodes, rows, heads // (lmax + 1) + 1)
            square = self(heads, heads), self(heads)
            dot_weights = DotWeights(None, *square, self(heads), self(heads), self(heads, heads), self(heads))
        elif SCORES[score].directional:
            raise NotImplementedError(f"weights of {score}")
        outputs = SCORES[score].outputs * heads
        coupling = self(PATHS[lmax], spec.directions, rows).detach() if order > 0 else None
        nodes_in = (self(nodes, heads, width), self(nodes, heads, width), self(nodes, rows, heads * per_head), dot)
        weights = (self.radial(1, outputs, hidden, basis), dot_weights, coupling)
        return (spec, *nodes_in, vec, edges, *weights)


@pytest.fixture
def make() -> Make:
    """Float64 on the CPU: Triton's interpreter."""
    return Make()


def mode_of(weights: Iterable[Tensor | None], compiled: bool) -> Mode:
    """What an execution decides for an operation with such weights."""
    trained = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights)
    return Mode(trained, compiled, "highest" if compiled else torch.get_float32_matmul_precision())


def leaves(arguments: object) -> list[Tensor]:
    """All tensors that need gradients in nested arguments, in order."""
    if isinstance(arguments, Tensor):
        return [arguments] if arguments.requires_grad else []
    if isinstance(arguments, tuple | list):
        return [t for a in arguments for t in leaves(a)]
    return []


@pytest.fixture
def find_leaves() -> Callable[[object], list[Tensor]]:
    """:func:`leaves`, for test modules (which cannot import this file by name)."""
    return leaves


@pytest.fixture
def compare() -> Callable[..., None]:
    """Compare an operation with its reference: value, all gradients, one gradient alone, all second derivatives."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).detach()) if b.numel() else 0.0

    def run(op: Tensor, reference: Tensor, inputs: list[Tensor], tolerance: float = 1e-11) -> None:
        assert op.shape == reference.shape
        assert not op.isnan().any()
        assert relative(op, reference) < tolerance
        cotangent = torch.randn_like(op)
        for n in range(min(4, len(inputs))):  # one input alone takes the path for frozen weights
            (a,) = torch.autograd.grad(op, inputs[n : n + 1], cotangent, retain_graph=True)
            (b,) = torch.autograd.grad(reference, inputs[n : n + 1], cotangent, retain_graph=True)
            assert not a.isnan().any()
            assert relative(a, b) < tolerance, f"gradient of input {n} alone"
        first = torch.autograd.grad(op, inputs, cotangent, create_graph=True)
        expected = torch.autograd.grad(reference, inputs, cotangent, create_graph=True)
        for n, (a, b) in enumerate(zip(first, expected, strict=True)):
            assert relative(a, b) < tolerance, f"gradient of input {n}"
        weights = [torch.randn_like(g) for g in first]
        second, expected = (
            torch.autograd.grad(
                sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), inputs, materialize_grads=True
            )
            for grads in (first, expected)
        )
        for n, (a, b) in enumerate(zip(second, expected, strict=True)):
            assert relative(a, b) < tolerance, f"second derivative of input {n}"

    return run


@dataclass
class Operation:
    """An operation, its reference and its arguments by name; ``run`` and ``reference`` take such a mapping.

    moving: the inputs by whose gradients forces come about.
    """

    run: Callable[[dict[str, Tensor]], Tensor]
    reference: Callable[[dict[str, Tensor]], Tensor]
    tensors: dict[str, Tensor]
    moving: tuple[str, ...]

    def inputs(self) -> dict[str, Tensor]:
        """The tensors that have gradients."""
        return {n: t for n, t in self.tensors.items() if t.is_floating_point() and n != "coupling"}

    def change(self, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The tensors after ``function``; those with gradients are leaves again."""
        inputs = self.inputs()
        return {n: function(t.detach()).requires_grad_(n in inputs) for n, t in self.tensors.items()}


def _named(prefix: str, weights: RadialWeights) -> dict[str, Tensor]:
    return {f"{prefix}.{n}": t for n, t in weights._asdict().items() if t is not None}


def _radial(tensors: dict[str, Tensor], prefix: str = "radial") -> RadialWeights:
    return RadialWeights(*(tensors.get(f"{prefix}.{n}") for n in RadialWeights._fields))


def _indices(edges: EdgeList) -> dict[str, Tensor]:
    return {n: getattr(edges, n) for n in ("source", "target", "row_ptr", "species")}


def _edges(tensors: dict[str, Tensor], chunk: int | None) -> EdgeList:
    return EdgeList(*(tensors[n] for n in ("source", "target", "row_ptr", "species")), max_edges=chunk)


def _splines(tensors: dict) -> dict:
    """Splines of the radial networks among the tensors, as an option of the operation."""
    return {"splines": tensors["splines"]} if "splines" in tensors else {}


def _dot_weights(tensors: dict[str, Tensor]) -> DotWeights | None:
    if "dot" not in tensors:
        return None
    radial = _radial(tensors, "dot_weights.radial") if "dot_weights.radial.basis" in tensors else None
    return DotWeights(radial, *(tensors.get(f"dot_weights.{n}") for n in DotWeights._fields[1:]))


def attention_operation(
    make: Make, size: int = 7, compiled: bool = False, nodes: int = 4, score: str = "qk", **sizes
) -> Operation:
    from e2former_kernels.equivariant_attention import equivariant_attention, equivariant_attention_reference

    chunk = sizes.get("chunk")
    spec, *given, edges, radial, dot_weights, coupling = make.attention(score, edges=size, nodes=nodes, **sizes)
    names = ("query", "key", "value", "dot", "vec")
    tensors = {n: t for n, t in zip(names, given, strict=True) if t is not None} | _indices(edges)
    tensors |= _named("radial", radial) | ({} if coupling is None else {"coupling": coupling})
    if dot_weights is not None:
        tensors |= {f"dot_weights.{n}": t for n, t in dot_weights._asdict().items() if isinstance(t, Tensor)}
        tensors |= {} if dot_weights.radial is None else _named("dot_weights.radial", dot_weights.radial)

    def arguments(t: dict[str, Tensor]) -> tuple:
        return spec, *(t.get(n) for n in names), _edges(t, chunk), _radial(t), _dot_weights(t), t.get("coupling")

    def kernels(t: dict[str, Tensor]) -> Tensor:
        options = {"half": t.get("half", False), "mode": mode_of(_radial(t), compiled), **_splines(t)}
        return equivariant_attention(*arguments(t), **options)

    reference = lambda t: equivariant_attention_reference(*arguments(t))  # noqa: E731
    return Operation(kernels, reference, tensors, ("vec", "query", "key", "value"))


def edge_degree_operation(
    make: Make, size: int = 7, compiled: bool = False, nodes: int = 4, lmax: int = 2, **sizes
) -> Operation:
    from e2former_kernels.edge_degree import EmbeddingSpec, edge_degree_embedding, edge_degree_embedding_reference

    chunk = sizes.pop("chunk", None)
    width, hidden, basis = sizes.get("width", 6), sizes.get("hidden", 4), sizes.get("basis", 5)
    vec, edges = make.edges(nodes, size)
    tensors = {"vec": vec} | _indices(edges) | _named("radial", make.radial(lmax + 1, width, hidden, basis))

    def arguments(t: dict[str, Tensor]) -> tuple:
        return EmbeddingSpec(lmax, basis, Envelope(3.0)), t["vec"], _edges(t, chunk), _radial(t)

    def kernels(t: dict[str, Tensor]) -> Tensor:
        return edge_degree_embedding(*arguments(t), mode=mode_of(_radial(t), compiled), **_splines(t))

    reference = lambda t: edge_degree_embedding_reference(*arguments(t))  # noqa: E731
    return Operation(kernels, reference, tensors, ("vec",))


def norm_operation(make: Make, size: int = 7, compiled: bool = False, channels: int = 6, lmax: int = 2) -> Operation:
    from e2former_kernels.layer_norm import equivariant_rms_norm, equivariant_rms_norm_reference

    shapes = {"x": (size, (lmax + 1) ** 2, channels), "weight": (lmax + 1, channels), "bias": (channels,)}
    tensors = {n: make(*s) for n, s in (shapes | {"shift": (size, channels)}).items()}
    return Operation(
        lambda t: equivariant_rms_norm(**t, mode=mode_of([t["weight"]], compiled)),
        lambda t: equivariant_rms_norm_reference(**t),
        tensors,
        ("x", "shift"),
    )


def feedforward_operation(
    make: Make, size: int = 7, compiled: bool = False, channels: int = 6, lmax: int = 2, power: bool = False
) -> Operation:
    from e2former_kernels.feedforward import gated_feedforward, gated_feedforward_reference

    degrees, c = lmax + 1, channels
    shapes = {
        "x": (size, degrees**2, c),
        "norm_weight": (degrees, c),
        "norm_bias": (c,),
        "weight1": (degrees, c, c),
        "bias1": (c,),
        "gate_weight": (degrees * c, c),
        "gate_bias": (degrees * c,),
        "weight2": (degrees, c, c),
        "bias2": (c,),
    } | ({"power_weight": (c, lmax * c)} if power else {})
    tensors = {n: make(*s) for n, s in shapes.items()}

    def run(t: dict[str, Tensor]) -> Tensor:
        return gated_feedforward(**t, mode=mode_of([t["weight1"]], compiled))

    return Operation(run, lambda t: gated_feedforward_reference(**t), tensors, ("x",))


def query_key_operation(
    make: Make, size: int = 7, compiled: bool = False, channels: int = 6, lmax: int = 2, width: int = 5
) -> Operation:
    from e2former_kernels.query_key import QueryKeyWeights, query_key, query_key_reference

    degrees, g, outputs = lmax + 1, width, 8
    shapes = {
        "weight": (degrees, 4 * g, channels),
        "bias": (2 * g,),
        "hidden_weight": (2, g, degrees * g),
        "hidden_bias": (2, g),
        "norm_weight": (2, g),
        "norm_bias": (2, g),
        "out_weight": (2, outputs, g),
        "out_bias": (2, outputs),
    }
    tensors = {"h": make(size, degrees**2, channels)} | {n: make(*s) for n, s in shapes.items()}

    def call(function: Callable, **options) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda t: function(t["h"], QueryKeyWeights(*(t[n] for n in shapes)), **options)

    def run(t: dict[str, Tensor]) -> Tensor:
        return call(query_key, mode=mode_of([t["weight"]], compiled))(t)

    return Operation(run, call(query_key_reference), tensors, ("h",))


def grouped_operation(make: Make, size: int = 7, compiled: bool = False) -> Operation:
    from e2former_kernels.linear import grouped_linear

    rows, inputs = (1, 3, 5), (2, 4, 3)
    widths = [r * i for r, i in zip(rows, inputs, strict=True)]
    tensors = {"x": make(size, sum(widths)), "bias": make(3)}
    tensors |= {f"weights[{n}]": make(3, i) for n, i in enumerate(inputs)}

    def run(t: dict[str, Tensor]) -> Tensor:
        weights = [t[f"weights[{n}]"] for n in range(3)]
        return grouped_linear(t["x"], weights, rows, t["bias"], mode_of(weights, compiled))

    def reference(t: dict[str, Tensor]) -> Tensor:
        parts = zip(t["x"].split(widths, 1), rows, (t[f"weights[{n}]"] for n in range(3)), strict=True)
        y = torch.cat([(p.reshape(-1, r, w.shape[1]) @ w.t()).flatten(1) for p, r, w in parts], 1)
        return torch.cat([y[:, :3] + t["bias"], y[:, 3:]], 1)

    return Operation(run, reference, tensors, ("x",))


def so3_operation(make: Make, size: int = 7, compiled: bool = False, channels: int = 6) -> Operation:
    from e2former_kernels.linear import so3_linear

    def reference(t: dict[str, Tensor]) -> Tensor:
        degree = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2], device=t["x"].device)
        y = torch.einsum("nmi,moi->nmo", t["x"], t["weight"][degree])
        return torch.cat([y[:, :1] + t["bias"], y[:, 1:]], 1)

    tensors = {"x": make(size, 9, channels), "weight": make(3, 8, channels), "bias": make(8)}
    return Operation(lambda t: so3_linear(**t, mode=mode_of([t["weight"]], compiled)), reference, tensors, ("x",))


OPERATIONS = {
    **{f"attention{s.removeprefix('qk')}": functools.partial(attention_operation, score=s) for s in SCORES},
    "edge_degree": edge_degree_operation,
    "norm": norm_operation,
    "feedforward": feedforward_operation,
    "feedforward_power": functools.partial(feedforward_operation, power=True),
    "query_key": query_key_operation,
    "grouped_linear": grouped_operation,
    "so3_linear": so3_operation,
}


@pytest.fixture
def operation(make: Make, request: pytest.FixtureRequest) -> Callable[..., Operation]:
    """Build the operation of a name at given sizes."""
    return lambda name, **sizes: OPERATIONS[name](make, **sizes)
