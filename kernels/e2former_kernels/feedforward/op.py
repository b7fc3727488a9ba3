r"""Gated feed-forward network with Triton kernels: nothing is kept for the backward pass but its input.

With c the cotangent of the gradient by x, the second derivative is that of <c, gradient> = <grad, change along c>: a
forward pass with the change :math:`\dot y` along :math:`\dot x` = c, which is the derivative by ``grad``, then one
reverse pass over value and change. Without a change the same reverse pass gives the first derivative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from e2former_kernels.common.backend import EXACT, Mode
from e2former_kernels.common.call import Change, NodeCall, apply_call
from e2former_kernels.common.checks import check_nodes
from e2former_kernels.common.chunks import node_chunks
from e2former_kernels.common.half import Rows
from e2former_kernels.common.registered import Settings, register
from e2former_kernels.common.sums import ChunkSums, degree_sums
from e2former_kernels.common.tiles import next_power
from e2former_kernels.feedforward import kernels as kernel
from e2former_kernels.feedforward.half import HalfWeights, half_gradient, half_value
from e2former_kernels.feedforward.kernels import launch_power, launch_power_backward
from e2former_kernels.feedforward.reference import SIGMOID_SCALE, SILU_SCALE, Weights, gated_feedforward_reference
from e2former_kernels.layer_norm.op import launch_norm, launch_norm_reverse, launch_norm_tangent
from e2former_kernels.linear.op import add_so3_outer, apply_so3, so3_rows


def _gate(gate_kernel, y: Tensor, *tensors: Tensor, **constants: bool) -> None:
    _, rows, channels = y.shape
    block = min(next_power(channels), 256)
    gate_kernel[y.shape[0], math.ceil(channels / block)](
        *tensors, channels, SILU=SILU_SCALE, SIGMOID=SIGMOID_SCALE, D=round(rows**0.5), BC=block, num_warps=2,
        **constants,
    )  # fmt: skip


def _first(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """y = W1 x + b1 and the gates of it. x: normalised."""
    y = apply_so3(x, weights.weight1, False, torch.empty_like(x))
    y[:, 0].add_(weights.bias1)
    return y, torch.addmm(weights.gate_bias, y[:, 0], weights.gate_weight.t())


def of_rows(weights: Weights) -> Weights:
    """The weights as the passes take them: with the SO3 linears' for every row, [M, C, C]."""
    return weights._replace(weight1=so3_rows(weights.weight1), weight2=so3_rows(weights.weight2))


def gradients(
    grad: Tensor, x: Tensor, x_dot: Tensor | None, weights: Weights, by_weights: bool, residual: bool = False
) -> list[Tensor | None]:
    """Gradients of <grad, value at x>, or of <grad, change along x_dot>: by grad (the change), by x, by the weights.

    grad, x, x_dot: [N, M, C], contiguous; weights: of rows, the gradients of degrees. by_weights: whether there are
    any; None among them stands for zeros. residual: of x + the network.
    """
    by_x = torch.empty_like(x)
    change = None if x_dot is None else torch.empty_like(x)
    sums = ChunkSums() if by_weights else None
    for chunk in node_chunks(x.shape[0]) if x.numel() else ():
        nodes = chunk.nodes
        if x_dot is None:
            _first_derivative(grad[nodes], x[nodes], weights, by_x[nodes], sums, residual)
        else:
            _second_derivative(grad[nodes], x[nodes], x_dot[nodes], weights, by_x[nodes], change[nodes], sums)
    if change is not None and residual:
        change += x_dot
    return [change, by_x, *(() if sums is None else _of_weights(sums))]


def _first_derivative(
    grad: Tensor, x: Tensor, weights: Weights, by_x: Tensor, sums: ChunkSums | None, residual: bool
) -> None:
    normal = launch_norm(x, weights.norm_weight, weights.norm_bias, None)
    if weights.power_weight is not None:
        power = launch_power(Rows(normal, None))
        normal[:, 0].addmm_(power, weights.power_weight.t())
    y, gates = _first(normal, weights)
    if sums is not None:
        z = torch.empty_like(y)
        _gate(kernel.gate_change_kernel, y, y, y, gates, gates, z, TANGENT=False)
        add_so3_outer(sums, "weight2", grad, z)
    part = apply_so3(grad, weights.weight2, True, torch.empty_like(y))
    _gate(kernel.gate_backward_kernel, y, part, y, gates)
    torch.mm(gates, weights.gate_weight, out=part[:, 0])
    if sums is not None:
        sums.add_product("gate_weight", gates.t(), y[:, 0])
        add_so3_outer(sums, "weight1", part, normal)
    by_normal = apply_so3(part, weights.weight1, True, y)
    if weights.power_weight is not None:
        launch_power_backward(Rows(normal, None), by_normal[:, 0] @ weights.power_weight, Rows(by_normal, None))
        if sums is not None:
            sums.add_product("power_weight", by_normal[:, 0].t(), power)
    beside = grad if residual else None
    _, by_weight = launch_norm_reverse(
        x, weights.norm_weight, by_normal, None, None, sums is not None, by_x, beside=beside
    )
    if sums is not None:
        sums.add("norm_weight", by_weight)
        sums.add_columns(bias2=grad[:, 0], gate_bias=gates, bias1=part[:, 0], norm_bias=by_normal[:, 0])


def _second_derivative(
    grad: Tensor, x: Tensor, x_dot: Tensor, weights: Weights, by_x: Tensor, change: Tensor, sums: ChunkSums | None
) -> None:
    normal, normal_dot = launch_norm_tangent(x, x_dot, weights.norm_weight, weights.norm_bias)
    if weights.power_weight is not None:
        power, power_dot = launch_power(Rows(normal, None)), launch_power(Rows(normal, None), normal_dot)
        normal[:, 0].addmm_(power, weights.power_weight.t())
        normal_dot[:, 0].addmm_(power_dot, weights.power_weight.t())
    y, gates = _first(normal, weights)
    y_dot = apply_so3(normal_dot, weights.weight1, False, torch.empty_like(y))
    gates_dot = y_dot[:, 0] @ weights.gate_weight.t()
    z = torch.empty_like(y)
    _gate(kernel.gate_change_kernel, y, y, y_dot, gates, gates_dot, z, TANGENT=True)
    apply_so3(z, weights.weight2, False, change)
    if sums is not None:
        add_so3_outer(sums, "weight2", grad, z)
    part = apply_so3(grad, weights.weight2, True, z)
    _gate(kernel.gate_change_backward_kernel, y, part, y, y_dot, gates, gates_dot)
    if sums is not None:
        sums.add_product("gate_weight", gates.t(), y[:, 0])
        sums.add_product("gate_weight", gates_dot.t(), y_dot[:, 0])
    # part and y_dot hold the gradients by y_dot and y
    torch.mm(gates_dot, weights.gate_weight, out=part[:, 0])
    torch.mm(gates, weights.gate_weight, out=y_dot[:, 0])
    if sums is not None:
        add_so3_outer(sums, "weight1", y_dot, normal)
        add_so3_outer(sums, "weight1", part, normal_dot)
    by_normal = apply_so3(y_dot, weights.weight1, True, y)
    if weights.power_weight is None:
        by_normal_dot = apply_so3(part, weights.weight1, True, normal_dot)
    else:
        by_normal_dot = apply_so3(part, weights.weight1, True, torch.empty_like(part))
        by_power, by_power_dot = (by[:, 0] @ weights.power_weight for by in (by_normal, by_normal_dot))
        change = normal_dot, by_power_dot, by_normal_dot
        launch_power_backward(Rows(normal, None), by_power, Rows(by_normal, None), change=change)
        if sums is not None:
            sums.add_product("power_weight", by_normal[:, 0].t(), power)
            sums.add_product("power_weight", by_normal_dot[:, 0].t(), power_dot)
    _, by_weight = launch_norm_reverse(x, weights.norm_weight, by_normal, x_dot, by_normal_dot, sums is not None, by_x)
    if sums is not None:
        sums.add("norm_weight", by_weight)
        sums.add_columns(gate_bias=gates, bias1=y_dot[:, 0], norm_bias=by_normal[:, 0])


def _of_weights(sums: ChunkSums) -> Weights:
    found: dict[str, Tensor] = dict(sums)
    if found:
        found |= {name: degree_sums(found[name]) for name in ("weight1", "weight2")}
    return Weights(*(found.get(name) for name in Weights._fields))


@dataclass(frozen=True)
class _FeedForward(NodeCall):
    residual: bool
    trained: bool
    prepared: HalfWeights | Weights | None  # of frozen weights, kept by the caller
    # what the passes of a training step share: weights for every row, three times as many numbers as they have
    cache: dict = field(default_factory=dict, compare=False)

    def reference(self, *tensors: Tensor) -> Tensor:
        return gated_feedforward_reference(*tensors, residual=self.residual)

    def _given(self, tensors: list[Tensor]) -> tuple[Tensor, HalfWeights | Weights]:
        """x and the weights as the passes take them."""
        x, *weights = tensors
        if self.prepared is not None:
            return x.contiguous(), self.prepared
        rows = self.cache.get("rows") or of_rows(Weights(*weights))
        if self.trained:
            self.cache["rows"] = rows
        return x.contiguous(), rows

    def forward(self, tensors: list[Tensor]) -> Tensor:
        x, weights = self._given(tensors)
        if isinstance(weights, HalfWeights):
            return half_value(x, weights, self.residual)
        out = torch.empty_like(x)
        for chunk in node_chunks(x.shape[0]) if x.numel() else ():
            normal = launch_norm(x[chunk.nodes], weights.norm_weight, weights.norm_bias, None)
            if weights.power_weight is not None:
                normal[:, 0].addmm_(launch_power(Rows(normal, None)), weights.power_weight.t())
            y, gates = _first(normal, weights)
            _gate(kernel.gate_kernel, y, y, gates)
            apply_so3(y, weights.weight2, False, out[chunk.nodes])
        out[:, 0].add_(weights.bias2)
        return out.add_(x) if self.residual else out

    def backward(self, grad: Tensor, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
        grad, (x, weights) = grad.contiguous(), self._given(tensors)
        if isinstance(weights, HalfWeights):
            return [half_gradient(grad, x, weights, self.residual)]
        _, *found = gradients(grad, x, None, weights, any(wanted), self.residual)
        return [torch.zeros_like(tensors[n]) if found[n] is None else found[n] for n in wanted]

    def second(self, change: Change, tensors: list[Tensor], by: list[int]) -> list[Tensor | None] | None:
        if change.wanted != [0]:
            return None
        x, weights = self._given(tensors)
        if isinstance(weights, HalfWeights):
            weights = of_rows(weights.given)
        given = change.grad.contiguous(), x, change.cotangents[0].contiguous()
        found = gradients(*given, weights, any(n > 1 for n in by), self.residual)
        return [found[n] for n in by]


def _call(residual: bool, mode: Mode, prepared: HalfWeights | Weights | None, x: Tensor, *rest: Tensor) -> _FeedForward:
    weights, (degrees, channels) = Weights(*rest), (rest[0].shape[0], x.shape[-1])
    square, one = ("lmax+1, C, C", (degrees, channels, channels)), ("C", (channels,))
    gates = degrees * channels
    expected = Weights(
        ("lmax+1, C", (degrees, channels)), one, square, one, ("(lmax+1) C, C", (gates, channels)),
        ("(lmax+1) C", (gates,)), square, one, ("C, lmax C", (channels, gates - channels)),
    )  # fmt: skip
    named = {name: (t, *e) for name, t, e in zip(Weights._fields, weights, expected, strict=True)}
    check_nodes("gated_feedforward", "x", x, degrees, **named)
    if prepared is not None and mode.trained:
        raise ValueError("gated_feedforward: prepared: expected None where weights are trained")
    return _FeedForward(residual, mode.trained, prepared)


_registered = register(
    "gated_feedforward",
    lambda tensors, _, settings, mode: _call(bool(settings.integers[0]), mode, None, *tensors),
    lambda tensors, *_: tensors[0].new_empty(tensors[0].shape),
)


def gated_feedforward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    power_weight: Tensor | None = None,
    residual: bool = False,
    prepared: HalfWeights | Weights | None = None,
    mode: Mode = EXACT,
) -> Tensor:
    """The function of :func:`gated_feedforward_reference` with Triton kernels; differentiable to any order.

    residual: plus x, without another pass over either with float16 rows. prepared: of weights that do not change and
    need no gradient, :func:`.half.half_weights` for value and gradient by x with float16 rows (``half.py``), or
    :func:`of_rows`; float32 and made here when None; without effect where ``mode`` is compiled, for which see
    :mod:`e2former_kernels.common.registered`. Raises ValueError, TypeError or RuntimeError for arguments that do not
    fit or a device without Triton.
    """
    tensors = [x, norm_weight, norm_bias, weight1, bias1, gate_weight, gate_bias, weight2, bias2]
    tensors += [] if power_weight is None else [power_weight]
    if mode.compiled:
        return _registered(tensors, mode, settings=Settings([int(residual)]))
    return apply_call(_call(residual, mode, prepared, *tensors), tensors)
