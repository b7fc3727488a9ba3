"""Equivariant attention with Triton kernels: no tensor with an edge dimension outlives a bounded chunk of edges.

Value, first and second derivative have fused kernels (``fused.py``, ``second.py``). Derivatives beyond, and second ones
of gradients by weights, evaluate the reference chunk by chunk
(:func:`e2former_kernels.equivariant_attention.reference.attention_plan`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.call import apply_call
from e2former_kernels.common.checks import check_device, check_float, check_radial, check_same, check_tensors
from e2former_kernels.common.chunks import EdgeList
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.common.registered import Settings, flags, register, there, with_gaps
from e2former_kernels.equivariant_attention.fused import DirectionalAttention, FusedAttention
from e2former_kernels.equivariant_attention.reference import AttentionSpec, Form, Pieces, check_nodes_and_edges
from e2former_kernels.equivariant_attention.score import SCORES, DotWeights
from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines, check_splines

# Working memory of a chunk, in numbers (not bytes), whatever the number of atoms and edges: of the fused kernels where
# everything fits in one chunk (1.3 GB in float32, which a CUDA graph can replay), as always in training, and where it
# does not (1.1 GB), and of second derivatives and weight gradients (2.7 GB; 1.6 GB where there is no directional gate
# and everything does not fit in one chunk).
SINGLE_NUMBERS = 5 << 26
FUSED_NUMBERS = 1 << 28
GATE_NUMBERS = 5 << 27
SECOND_NUMBERS = 3 << 27


def check_arguments(spec: AttentionSpec, pieces: Pieces, edges: EdgeList, coupling: Tensor | None, form: Form) -> None:
    """Raise ValueError or TypeError naming the argument whose shape, dtype or device is not what it must be."""
    value, score = pieces.value, SCORES[spec.score]
    check_nodes_and_edges(spec, pieces, edges, coupling, form)
    check_device("equivariant_attention", value.device)
    if spec.refusal is not None:
        raise ValueError(spec.refusal)
    if score.directional:
        shapes = score.weights(spec, pieces.dot_weights, value, pieces.dot.shape[-1])
        named = {f"dot_weights.{name}": (getattr(pieces.dot_weights, name), *shapes[name]) for name in shapes}
        check_tensors("value", value, **named)
    if form not in ("relative", "sum"):
        raise ValueError(f"form: the kernels compute 'relative' and 'sum', got {form!r}")
    check_radial("radial", pieces.radial, "value", value, 1, spec.num_basis, score.outputs * spec.num_heads)
    named = {"query": pieces.query, "key": pieces.key, "vec": pieces.vec, "dot": pieces.dot, "coupling": coupling}
    check_same("value", value, **named)
    check_float("value", value)
    if value.dtype == torch.float64 and value.device.type == "cuda":
        raise TypeError("value: expected float32 on a GPU; float64 goes through equivariant_attention_reference")


def make_call(
    spec: AttentionSpec,
    pieces: Pieces,
    edges: EdgeList,
    coupling: Tensor | None,
    form: Form,
    mode: Mode,
    splines: RadialSplines | None,
    half: bool = False,
) -> FusedAttention:
    """The operation on one graph. Raises as :func:`equivariant_attention` does."""
    value, score, relative = pieces.value, SCORES[spec.score], spec.order > 0 and form == "relative"
    check_arguments(spec, pieces, edges, coupling, form)
    hidden, per_row = pieces.radial.hidden.shape[-1], value.shape[-1] * value.shape[1]
    if splines is not None and score.directional:
        raise ValueError("splines: expected None for this score, whose features no splines give")
    if splines is not None:
        check_splines(splines, value, 2 * spec.num_heads, mode.trained)
    directions = spec.directions if relative else 1
    if half and mode.trained:
        raise ValueError("half: expected false where weights are trained")
    # of an edge, and its share of the receivers' outer products, at some thirty edges each; their gradients may be half
    share = 64 if half else 32
    numbers = 2 * spec.num_heads + 8 + directions * (1 + spec.num_heads // 32) + directions * per_row // share
    if splines is None:
        numbers += 4 * spec.num_heads + 3 * hidden
    budget = SINGLE_NUMBERS if mode.trained else FUSED_NUMBERS
    # two numbers, a value and its change, of the radial network's layers, features, scores, weights and gradients
    second = 6 * hidden + 14 * spec.num_heads + 32, SECOND_NUMBERS
    if score.directional:  # and of each network's first, middle and last layer, of harmonics, and of the gate's input
        rows, width = spec.num_rows, pieces.dot.shape[-1]
        numbers += score.numbers(spec, hidden, width)
        shared = 14 * spec.num_heads + 12 * hidden + 2 * spec.num_basis + 2 * rows + 2 * rows * -(-width // 64)
        second = shared + score.second(spec, hidden, width), GATE_NUMBERS
    return (DirectionalAttention if score.directional else FusedAttention)(
        precision=mode.dot(value.dtype),
        spec=spec,
        form=form,
        edges=edges,
        chunks=edges.chunks(numbers, budget, SINGLE_NUMBERS),
        training_chunks=partial(edges.chunks, second[0] + directions * per_row // 32, second[1], GATE_NUMBERS),
        coupling=coupling.flatten(1).contiguous() if relative else None,
        splines=splines,
        half=half,
        trained=mode.trained,
        radial=pieces.radial,
        dot_weights=pieces.dot_weights,
        outline=pieces.outline(),
    )


def _settings(
    spec: AttentionSpec,
    pieces: Pieces,
    edges: EdgeList,
    coupling: Tensor | None,
    form: Form,
    splines: RadialSplines | None,
) -> Settings:
    """All that is no tensor, for :func:`_make_call`; first the rows of the value."""
    relative = spec.order > 0 and form == "relative"
    rows = coupling.shape[0] if relative else pieces.value.shape[1]
    integers = [spec.lmax, spec.num_heads, spec.num_basis, spec.order, edges.max_edges or 0]
    intervals, *of_splines = (0,) if splines is None else splines[2:]
    known = flags([coupling, *(splines or (None, None))[:2], *pieces.every()])
    words = f"{form} {spec.score} {spec.norm} {spec.inverse_distance}"
    return Settings([rows, intervals, *integers, *known], [*of_splines, *spec.envelope.numbers], words)


def _make_call(tensors: list[Tensor], index: list[Tensor], settings: Settings, mode: Mode) -> FusedAttention:
    _, intervals, lmax, heads, basis, order, max_edges, *known = settings.integers
    form, score, norm, inverse_distance = settings.words.split()
    coupling, knots, pair_row = with_gaps(index[6:], known[:3])
    numbers, splines = list(settings.numbers), None
    if knots is not None:
        splines = RadialSplines(knots, pair_row, intervals, numbers.pop(0), numbers.pop(0))
    spec = AttentionSpec(lmax, heads, basis, Envelope.of(numbers), score, norm, order, inverse_distance)
    pieces = Pieces.of(with_gaps(tensors, known[3:]))
    return make_call(spec, pieces, EdgeList.of(index[:6], max_edges), coupling, form, mode, splines)


def _shape(tensors: list[Tensor], index: list[Tensor], settings: Settings) -> Tensor:
    _, query, _, value, *_ = tensors
    return value.new_empty(query.shape[0], settings.integers[0], value.shape[2])


_registered = register("equivariant_attention", _make_call, _shape)


def equivariant_attention(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dot: Tensor | None,
    vec: Tensor,
    edges: EdgeList,
    radial: RadialWeights,
    dot_weights: DotWeights | None = None,
    coupling: Tensor | None = None,
    *,
    form: Form = "relative",
    splines: RadialSplines | None = None,
    recompute_value: Callable[[], Tensor] | None = None,
    half: bool = False,
    mode: Mode = EXACT,
) -> Tensor:
    r"""Equivariant attention, the function of :func:`equivariant_attention_reference`, with Triton kernels.

    Arguments as there (form ``relative`` or ``sum``). splines: of the radial network (``radial/splines.py``), for score
    ``qk`` and weights that need no gradient; they stand for the network in value and first derivative, for every pair
    of elements that occurs. recompute_value: gives ``value`` once more, so that it is not kept (``common/call.py``).
    half: the rows of atoms that edges gather are float16 with a factor (``common/half.py``), for float32 inputs whose
    products may be rounded as TF32 does and weights without gradient.

    Inputs of 16 bits (autocast) are taken to float32; the result is float32. float64 runs in Triton's interpreter
    only. Differentiable to any order in every floating-point input; value, first and second derivative have the same
    bits every time. Raises ValueError, TypeError or RuntimeError for arguments that do not fit or a device without
    Triton. Where ``mode`` is compiled (``common/registered.py``), ``recompute_value`` and ``half`` have no effect.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.dtype.itemsize == 2 else t

    nodes = vec.to(dtype), cast(query), cast(key), cast(value).contiguous(), cast(dot)
    pieces = Pieces(*nodes, radial, dot_weights)
    if coupling is not None:
        coupling = coupling.to(dtype)
    if mode.compiled:
        index = [*edges.tensors(), *there([coupling, *(splines or ())[:2]])]
        settings = _settings(spec, pieces, edges, coupling, form, splines)
        return _registered(there(pieces.every()), mode, index, settings)
    call = make_call(spec, pieces, edges, coupling, form, mode, splines, half)
    return apply_call(call, [t for _, t in pieces.flat()], pieces.value, recompute_value)
