"""Equivariant attention with Triton kernels: no tensor with an edge dimension outlives a bounded run of edges.

Value, first and second derivative have fused kernels (``fused.py``, ``second.py``). Derivatives beyond, and second ones
of gradients by weights, evaluate the reference chunk by chunk
(:func:`e2former_kernels.equivariant_attention.reference.attention_plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode, triton_problem
from e2former_kernels.common.checks import check_edge_list, check_same_device, check_same_dtype, check_shape
from e2former_kernels.common.registered import Settings, flags, register, there, with_gaps
from e2former_kernels.common.runs import EdgeList, LazyRuns, run_size
from e2former_kernels.common.step import computed_again, run_step
from e2former_kernels.equivariant_attention.fused import DirectionalAttention, FusedAttention
from e2former_kernels.equivariant_attention.reference import (
    DotWeights,
    Form,
    Pieces,
    attention_plan,
    check_value,
)
from e2former_kernels.equivariant_attention.spec import AttentionSpec
from e2former_kernels.radial.reference import RadialWeights, check_radial
from e2former_kernels.radial.table import RadialTable, check_table

# Working memory of a run, in numbers (not bytes), whatever the number of atoms and edges: of the fused kernels where
# everything fits in one run (1.3 GB in float32, which a CUDA graph can replay) and where it does not (1.1 GB), in
# training (1.3 GB, fewer launches), and of its second derivatives and weight gradients (2.7 GB; 1.6 GB where there is
# no directional gate and everything does not fit in one run).
SINGLE_NUMBERS = 5 << 26
FUSED_NUMBERS = 1 << 28
TRAINING_NUMBERS = 5 << 26
GATE_NUMBERS = 5 << 27
SECOND_NUMBERS = 3 << 27


def check_dot_weights(spec: AttentionSpec, weights: DotWeights, width: int) -> None:
    """Raise ValueError naming the tensor whose shape is not what the score needs. width: D of ``dot``."""
    heads, columns = spec.num_heads, (spec.lmax + 1) * width
    shapes = {"bias": (heads,)}
    if spec.score == "qk_dot":
        check_radial("dot_weights.radial", weights.radial, 1, spec.num_basis, columns)
        shapes |= {"weight": (heads, columns)}
    else:
        if columns < heads:
            raise ValueError(f"dot: expected (lmax+1) D of at least H = {heads}, got {columns}")
        shapes |= dict.fromkeys(("weight", "out"), (heads, heads))
        shapes |= dict.fromkeys(("norm_weight", "norm_bias", "out_bias"), (heads,))
    for name, shape in shapes.items():
        dims = "H" if len(shape) == 1 else "H, (lmax+1) D" if spec.score == "qk_dot" else "H, H"
        check_shape(f"dot_weights.{name}", getattr(weights, name), dims, shape)


def check_arguments(
    spec: AttentionSpec,
    pieces: Pieces,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    species: Tensor,
    coupling: Tensor | None,
    form: Form,
) -> None:
    """Raise ValueError or TypeError naming the argument whose shape, dtype or device is not what it must be."""
    nodes, senders = row_ptr.numel() - 1, species.numel()
    query, value = pieces.query, pieces.value
    check_edge_list(pieces.vec, source, target, row_ptr, species)
    if query.dim() != 3:
        raise ValueError(f"query: expected [N, H, S], got {tuple(query.shape)}")
    check_shape("query", query, "N, H, S", (nodes, spec.num_heads, query.shape[-1]))
    check_shape("key", pieces.key, "N', H, S", (senders, *query.shape[1:]))
    check_value(spec, value, senders, form)
    if spec.score != "qk":
        if pieces.dot is None or pieces.dot_weights is None:
            raise ValueError(f"dot, dot_weights: score {spec.score!r} needs both, got None")
        check_shape("dot", pieces.dot, "N, (lmax+1)^2, D", (nodes, spec.num_rows, pieces.dot.shape[-1]))
        check_dot_weights(spec, pieces.dot_weights, pieces.dot.shape[-1])
    if form not in ("relative", "sum"):
        raise ValueError(f"form: the kernels compute 'relative' and 'sum', got {form!r}")
    if spec.order == 1 and form == "relative":
        if coupling is None:
            raise ValueError("coupling: order 1 needs the coefficients [P, 3, (lmax+1)^2], got None")
        check_shape("coupling", coupling, "P, 3, (lmax+1)^2", (coupling.shape[0], 3, spec.num_rows))
    width = spec.num_heads if spec.score == "qk_dot" else 2 * spec.num_heads
    check_radial("radial", pieces.radial, 1, spec.num_basis, width)
    check_same_device("value", value, source=source, target=target, row_ptr=row_ptr, species=species)
    named = {"query": query, "key": pieces.key, "vec": pieces.vec, "dot": pieces.dot, "coupling": coupling}
    named |= {f"radial.{n}": t for n, t in pieces.radial._asdict().items()}
    if pieces.dot_weights is not None:
        inner, *rest = pieces.dot_weights
        named |= {f"dot_weights.{n}": t for n, t in zip(DotWeights._fields[1:], rest, strict=True)}
        named |= {} if inner is None else {f"dot_weights.radial.{n}": t for n, t in inner._asdict().items()}
    check_same_device("value", value, **named)
    check_same_dtype("value", value, **named)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"value: expected float32 or float64, got {value.dtype}")
    if value.dtype == torch.float64 and value.device.type == "cuda":
        raise TypeError("value: expected float32 on a GPU; float64 goes through equivariant_attention_reference")


def second_numbers_of(spec: AttentionSpec, pieces: Pieces) -> int:
    """Working memory of one edge, in numbers, in the second derivative of score ``qk``: 2,600 for the paper's network.

    Two numbers, a value and its change, of the radial network's layers, of features, scores and weights, and gradients.
    """
    return 6 * pieces.radial.hidden.shape[-1] + 14 * spec.num_heads + 32


def gate_numbers_of(spec: AttentionSpec, pieces: Pieces) -> int:
    """Working memory of one edge, in numbers, in the second derivative with a directional gate.

    Two numbers, a value and its change, of: scores, weights and features with their gradients; first, middle and last
    of each radial network with their gradients; three arrays as wide as the gate's input, three of its hidden layer.
    """
    heads, hidden, rows = spec.num_heads, pieces.radial.hidden.shape[-1], spec.num_rows
    numbers = 14 * heads + 12 * hidden + 2 * spec.num_basis + 2 * rows
    numbers += 6 * pieces.dot_weights.weight.shape[1] + 2 * rows * -(-pieces.dot.shape[-1] // 64)
    return numbers + (8 * hidden if spec.score == "qk_dot" else 6 * heads)


class GraphTensors(NamedTuple):
    """Tensors that have no gradient."""

    source: Tensor
    target: Tensor
    row_ptr: Tensor
    species: Tensor
    coupling: Tensor | None
    source_order: Tensor | None
    source_ptr: Tensor | None


def make_step(
    spec: AttentionSpec,
    pieces: Pieces,
    graph: GraphTensors,
    form: Form,
    mode: Mode,
    table: RadialTable | None,
    max_run_edges: int | None = None,
    edges: EdgeList | None = None,
    half: bool = False,
) -> FusedAttention:
    """The operation on one graph. Raises as :func:`equivariant_attention` does."""
    source, target, row_ptr, species, coupling, source_order, source_ptr = graph
    problem = triton_problem(pieces.value.device)
    if problem is not None:
        raise RuntimeError(f"equivariant_attention: {problem}; use equivariant_attention_reference")
    check_arguments(spec, pieces, source, target, row_ptr, species, coupling, form)
    if edges is None:
        edges = EdgeList(source, target, row_ptr, species, source_order, source_ptr)
    hidden, per_row = pieces.radial.hidden.shape[-1], pieces.value.shape[-1] * pieces.value.shape[1]
    if table is not None and spec.score != "qk":
        raise ValueError("table: expected None for this score, whose features are no table's")
    if table is not None:
        check_table(table, pieces.value, 2 * spec.num_heads, mode.trained)
    relative = spec.order == 1 and form == "relative"
    directions = 3 if relative else 1
    if half and mode.trained:
        raise ValueError("half: expected false where weights are trained")
    # of an edge, and its share of the receivers' outer products, at some thirty edges each; their gradients may be half
    share = 64 if half else 32
    per_edge = 2 * spec.num_heads + 8 + directions * (1 + spec.num_heads // 32) + directions * per_row // share
    if table is None:
        per_edge += 4 * spec.num_heads + 3 * hidden
    if spec.score == "qk_dot":
        columns = (spec.lmax + 1) * pieces.dot.shape[-1]
        per_edge += 2 * columns + 3 * hidden + 3 * spec.num_rows
    elif spec.score == "qk_dot_scalar":
        per_edge += 5 * spec.num_heads + 3 * spec.num_rows
    budget, single = FUSED_NUMBERS, SINGLE_NUMBERS
    if mode.trained:
        budget = single = TRAINING_NUMBERS
    fused_size = max_run_edges or run_size(source.numel(), per_edge, budget, single)
    second_numbers, second_budget = second_numbers_of(spec, pieces), SECOND_NUMBERS
    if spec.score != "qk":
        second_numbers, second_budget = gate_numbers_of(spec, pieces), GATE_NUMBERS
    second_numbers += directions * per_row // 32
    second_size = max_run_edges or run_size(source.numel(), second_numbers, second_budget, GATE_NUMBERS)
    parts = {
        "spec": spec,
        "directions": directions,
        "chunks": edges.runs(fused_size),
        "training_chunks": LazyRuns(lambda: edges.runs(second_size)),
        "edges": edges,
        "coupling": coupling.flatten(1).contiguous() if relative else None,
        "radial": pieces.radial,
        "plan": attention_plan(spec, form, pieces, source, target, row_ptr, species, coupling),
        "table": table,
        "half": half,
        "trained": mode.trained,
        "precision": mode.dot(pieces.value.dtype),
    }
    if spec.score == "qk":
        return FusedAttention(**parts)

    outline = pieces.outline()

    def weights_of(tensors: list[Tensor]) -> tuple[RadialWeights, DotWeights]:
        given = outline.like(tensors)
        return given.radial, given.dot_weights

    return DirectionalAttention(**parts, weights_of=weights_of)


def _settings(
    spec: AttentionSpec,
    pieces: Pieces,
    index: Sequence[Tensor | None],
    form: Form,
    table: RadialTable | None,
    max_run_edges: int | None,
) -> Settings:
    """All that is no tensor, for :func:`_make_step`; first the rows of the value."""
    coupling = index[4] if spec.order == 1 and form == "relative" else None
    rows = pieces.value.shape[1] if coupling is None else coupling.shape[0]
    integers = [spec.lmax, spec.num_heads, spec.num_basis, spec.order, spec.envelope_exponent, max_run_edges or 0]
    intervals = 0 if table is None else table.intervals
    numbers = [*(() if table is None else (table.scale, table.error)), spec.cutoff, *(spec.bell or ())]
    words = f"{form} {spec.score} {spec.norm} {spec.inverse_distance}"
    return Settings([rows, intervals, *integers, *flags(index), *flags(pieces.every())], numbers, words)


def _make_step(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> FusedAttention:
    _, intervals, lmax, heads, basis, order, exponent, max_run, *known = settings.integers
    form, score, norm, inverse_distance = settings.words.split()
    *graph, knots, pair_row = with_gaps(index, known[:9])
    numbers, table = list(settings.numbers), None
    if knots is not None:
        table = RadialTable(knots, pair_row, intervals, numbers.pop(0), numbers.pop(0))
    cutoff, *bell = numbers
    spec = AttentionSpec(
        lmax, heads, basis, cutoff, score, norm, order, inverse_distance, exponent, tuple(bell) if bell else None
    )
    pieces = Pieces.of(with_gaps(tensors, known[9:]))
    return make_step(spec, pieces, GraphTensors(*graph), form, mode, table, max_run or None)


def _shape(tensors: list[Tensor], index: list[Tensor], settings: Settings) -> Tensor:
    _, query, _, value, *_ = tensors
    return value.new_empty(query.shape[0], settings.integers[0], value.shape[2])


_registered = register("equivariant_attention", _make_step, _shape)


@torch.compiler.disable()
def _run(spec: AttentionSpec, pieces: Pieces, value_again: Callable[[], Tensor] | None, *rest) -> Tensor:
    step = make_step(spec, pieces, *rest)
    with computed_again((pieces.value, value_again)):
        return run_step(step, there(pieces.every()))


def equivariant_attention(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dot: Tensor | None,
    vec: Tensor,
    source: Tensor,
    target: Tensor,
    row_ptr: Tensor,
    species: Tensor,
    radial: RadialWeights,
    dot_weights: DotWeights | None = None,
    coupling: Tensor | None = None,
    *,
    form: Form = "relative",
    source_order: Tensor | None = None,
    source_ptr: Tensor | None = None,
    max_run_edges: int | None = None,
    table: RadialTable | None = None,
    value_again: Callable[[], Tensor] | None = None,
    edges: EdgeList | None = None,
    half: bool = False,
    mode: Mode = EXACT,
) -> Tensor:
    r"""Equivariant attention, the function of :func:`equivariant_attention_reference`, with Triton kernels.

    Arguments as there (form ``relative`` or ``sum``). source_order: [E] permutation that sorts the edges by source,
    stable; source_ptr: [N+1] its CSR pointer; made when None. max_run_edges: edges worked on at a time (default: a
    fixed amount of working memory, whatever the number of edges). table: splines of the radial network
    (:func:`e2former_kernels.radial.table.build_radial_table`), for score ``qk`` and weights that need no
    gradient; they stand for the network in value and first derivative, for every pair of elements that occurs.
    value_again: gives ``value`` once more, so that it is not kept (:mod:`e2former_kernels.common.step`). edges: these
    same edges with what earlier calls made of them. half: the rows of atoms that edges gather are float16 with a factor
    (``common/half.py``), for float32 inputs whose products may be rounded as TF32 does and weights without gradient.

    Half-precision inputs (autocast) are taken to float32; the result is float32. float64 runs in Triton's interpreter
    only. Differentiable to any order in every floating-point input; value, first and second derivative have the same
    bits every time. Raises ValueError,
    TypeError or RuntimeError for arguments that do not fit or a device without Triton. Where ``mode`` is compiled,
    ``value_again``, ``edges`` and ``half`` have no effect; see :mod:`e2former_kernels.common.registered`.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t

    nodes = vec.to(dtype), cast(query), cast(key), cast(value).contiguous(), cast(dot)
    pieces = Pieces(*nodes, radial, dot_weights)
    if coupling is not None:
        coupling = coupling.to(dtype)
    graph = GraphTensors(source, target, row_ptr, species, coupling, source_order, source_ptr)
    if mode.compiled:
        index = (*graph, *(table or (None,) * 5)[:2])
        settings = _settings(spec, pieces, index, form, table, max_run_edges)
        return _registered(there(pieces.every()), mode, there(index), settings)
    return _run(spec, pieces, value_again, graph, form, mode, table, max_run_edges, edges, half)
