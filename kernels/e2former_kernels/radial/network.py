r"""Radial networks without a graph: cuBLAS's matrix products, with row kernels for everything between them.

:class:`RadialNetwork`, for weights that no gradient is asked for, has the value and its derivative by the distance.
:class:`RadialGradients` has also the change :math:`\dot F = F'(d)\,\dot d` of the features along a change of the
distances (the tangent), and one reverse pass over both, for second derivatives; without a tangent the same pass gives
the gradients by the weights. Callers pass edges in runs of bounded length. In float32 the first layer, a function of
the distance alone, comes from a table that is made from the weights of the moment (:func:`first_layer_table`). Sums
over edges are matrix products and partial sums in a fixed order.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.tiles import next_power
from e2former_kernels.compat import foreach_add_
from e2former_kernels.radial import kernels as kernel
from e2former_kernels.radial.reference import LAYER_NORM_EPS, RadialWeights

# Intervals of the table of W0 phi(d) for one distance of two Gaussian centres. Cubic Hermite interpolation of Gaussians
# of width two such distances is then good to 8e-9 of their weights, its slope to 8e-7 (errors h^4/384 and
# h^3 sqrt(3)/216 times the fourth derivative).
KNOTS_PER_CENTRE = 16
# The table reaches this many centre distances beyond the last Gaussian, which is 1e-14 there: exact at any distance.
CENTRES_BEYOND = 16
# Of the reverse kernels: no tangent, no sums for gradients by weights.
VALUE_ALONE = {"TANGENT": False, "WEIGHTS": False, "SUMS": 0, "steps": 1}


@functools.lru_cache(maxsize=8)
def _basis_pieces(num_basis: int, device: torch.device) -> Tensor:
    """Coefficients of the piecewise cubics of all Gaussians, [intervals * 4, num_basis], float64."""
    with torch.inference_mode(False):
        knot = torch.arange((num_basis - 1 + CENTRES_BEYOND) * KNOTS_PER_CENTRE + 1, dtype=torch.float64, device=device)
        centre = torch.arange(num_basis, dtype=torch.float64, device=device)
        t = 0.5 * (knot.unsqueeze(1) / KNOTS_PER_CENTRE - centre)
        value = torch.exp(-0.5 * t * t)
        slope = -0.5 / KNOTS_PER_CENTRE * t * value
        rise, left, right = value[1:] - value[:-1], slope[:-1], slope[1:]
        pieces = [value[:-1], left, 3.0 * rise - 2.0 * left - right, left + right - 2.0 * rise]
        return torch.stack(pieces, 1).flatten(0, 1)


def first_layer_table(basis: Tensor) -> Tensor:
    """Piecewise cubic of W0 phi(d) for the kernels, [intervals, 4, G, h]: coefficients in the position in the interval.

    basis: W0, [G, h, n_b]. An interval is the distance of two Gaussian centres over ``KNOTS_PER_CENTRE``.
    """
    groups, hidden, num_basis = basis.shape
    pieces = _basis_pieces(num_basis, basis.device)
    table = pieces @ basis.reshape(groups * hidden, num_basis).to(torch.float64).t()
    return table.to(basis.dtype).view(-1, 4, groups, hidden)


def norm_launch(groups: int, rows: int, width: int, norms: bool) -> tuple[tuple[int, int], dict]:
    """Grid and constants of the kernels on [groups, rows, width]."""
    padded = next_power(width)
    block = max(2048 // padded, 1)
    constants = {
        "E": rows, "G": groups, "H": width, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": block, "NORM": norms,
        "num_warps": 4,
    }  # fmt: skip
    return (math.ceil(rows / block), groups), constants


class RadialNetwork:
    """Radial networks with weights that no gradient is asked for, ready to be evaluated on runs of edges.

    cutoff: Å. last: with the last linear layer (results [E, G, K]) or without it (results [E, G, h]).
    """

    def __init__(self, weights: RadialWeights, cutoff: float, last: bool = True) -> None:
        self.weights = RadialWeights(*(None if t is None else t.detach().contiguous() for t in weights))
        self.cutoff, self.last = cutoff, last
        self.groups, self.hidden, self.num_basis = weights.basis.shape
        self.exact = weights.basis.dtype == torch.float64
        self.table = self.weights.basis if self.exact else first_layer_table(self.weights.basis)

    def _launch(self, edges: int) -> tuple[tuple[int, int], dict]:
        return norm_launch(self.groups, edges, self.hidden, self.weights.norm0_weight is not None)

    def _first(self, distance: Tensor, slope: bool) -> tuple[Tensor, Tensor, dict]:
        """Table, slopes and constants of the first layer's kernels."""
        if not self.exact:
            intervals = self.table.shape[0]
            scale = (self.num_basis - 1) * KNOTS_PER_CENTRE / self.cutoff
            return self.table, self.table, {"intervals": intervals, "scale": scale, "TABLE": True}
        spacing = self.cutoff / (self.num_basis - 1)
        centre = torch.arange(self.num_basis, dtype=distance.dtype, device=distance.device) * spacing
        t = (distance.unsqueeze(-1) - centre) * (0.5 / spacing)
        phi = torch.exp(-0.5 * t * t)
        weight = self.weights.basis.transpose(1, 2)
        value = torch.matmul(phi, weight)
        slopes = torch.matmul(phi * t * (-0.5 / spacing), weight) if slope else value
        return value, slopes, {"intervals": 1, "scale": 1.0, "TABLE": False}

    def _norm(self, which: int) -> tuple[Tensor, Tensor]:
        w = self.weights
        if w.norm0_weight is None:
            return w.basis, w.basis
        return (w.norm0_weight, w.norm0_bias) if which == 0 else (w.norm1_weight, w.norm1_bias)

    def forward(self, distance: Tensor, target_species: Tensor, source_species: Tensor) -> tuple[Tensor, Tensor]:
        """Results, and the second layer's products [G, E, h], which :meth:`backward` takes.

        distance: [E], Å; target_species, source_species: [E].
        """
        w, edges = self.weights, distance.numel()
        out = distance.new_empty(self.groups, edges, self.hidden)
        if not edges:
            width = w.out.shape[1] if self.last else self.hidden
            return distance.new_empty(0, self.groups, width), out
        grid, constants = self._launch(edges)
        table, _, first = self._first(distance, False)
        kernel.first_layer_kernel[grid](
            distance, distance, target_species, source_species, table, table, w.target_table, w.source_table,
            *self._norm(0), out, TANGENT=False, **first, **constants,
        )  # fmt: skip
        middle = torch.bmm(out, w.hidden.transpose(1, 2))
        if not self.last:
            out = out.view(edges, self.groups, self.hidden)
        kernel.layer_kernel[grid](
            middle, w.hidden_bias, *self._norm(1), out, EDGE_MAJOR=not self.last, TANGENT=False, **constants
        )
        if not self.last:
            return out, middle
        if self.groups == 1:
            return torch.addmm(w.out_bias[0], out[0], w.out[0].t()).unsqueeze(1), middle
        return torch.baddbmm(w.out_bias.unsqueeze(1), out, w.out.transpose(1, 2)).transpose(0, 1).contiguous(), middle

    def backward(
        self, grad: Tensor, middle: Tensor, distance: Tensor, target_species: Tensor, source_species: Tensor
    ) -> Tensor:
        """Gradient of ``sum(grad * forward(...))`` by the distance, [E]. ``middle`` is used up."""
        w, edges = self.weights, distance.numel()
        if not edges:
            return distance.new_empty(0)
        grid, constants = self._launch(edges)
        if self.last:
            if self.groups == 1:
                grad = torch.mm(grad.reshape(edges, -1), w.out[0]).unsqueeze(0)
            else:
                grad = torch.bmm(grad.transpose(0, 1), w.out)
        kernel.layer_reverse_kernel[grid](
            grad.contiguous(), middle, w.hidden_bias, *self._norm(1), middle, middle, EDGE_MAJOR=not self.last,
            **VALUE_ALONE, **constants,
        )  # fmt: skip
        grad = torch.bmm(middle, w.hidden)
        table, slopes, first = self._first(distance, True)
        out = distance.new_empty(self.groups, edges)
        kernel.first_layer_reverse_kernel[grid](
            grad, distance, distance, target_species, source_species, table, slopes, w.target_table, w.source_table,
            *self._norm(0), grad, out, out, grad, STORE=False, **VALUE_ALONE, **first, **constants,
        )  # fmt: skip
        return out[0] if self.groups == 1 else out.sum(0)


TILE_NUMBERS = 512  # numbers of one tile of the row kernels, which hold a dozen such tiles: 4 a thread
MAX_PROGRAMS = 4096  # programs that write partial sums of weight gradients, for each network


class Kept(NamedTuple):
    """What the reverse pass takes over: T = 1, or 2 with a tangent."""

    distance: Tensor  # [E]
    distance_dot: Tensor | None  # [E]
    target_species: Tensor
    source_species: Tensor
    first: Tensor  # [G, T, E, h], results of the first layer
    middle: Tensor  # [G, T, E, h], products of the second layer
    last: Tensor  # [G, T, E, h], results of the second layer (nothing without the last linear layer)


class RadialGradients:
    """Radial networks, evaluated on runs of edges with what their gradients need.

    cutoff: Å. last: with the last linear layer (K results) or without it (K = h results). network: the same, where it
    is made already.
    """

    def __init__(
        self, weights: RadialWeights, cutoff: float, last: bool = True, network: RadialNetwork | None = None
    ) -> None:
        self.network = RadialNetwork(weights, cutoff, last) if network is None else network
        self.weights, self.last = self.network.weights, last
        self.groups, self.hidden, self.num_basis = weights.basis.shape
        self.spacing = float(cutoff / (self.num_basis - 1))

    def _launch(self, edges: int, tangent: bool, sums: bool = False) -> tuple[tuple[int, int], dict, int]:
        """Grid and constants of the row kernels, and the tiles of one program."""
        padded = next_power(self.hidden)
        block = max(TILE_NUMBERS // padded, 1)
        steps = math.ceil(math.ceil(edges / block) / MAX_PROGRAMS) if sums else 1
        constants = {
            "E": edges, "G": self.groups, "H": self.hidden, "EPS": LAYER_NORM_EPS, "HP": padded, "BE": block,
            "NORM": self.weights.norm0_weight is not None, "TANGENT": tangent, "num_warps": 4,
        }  # fmt: skip
        return (math.ceil(edges / (block * steps)), self.groups), constants, steps

    def forward(
        self, distance: Tensor, target_species: Tensor, source_species: Tensor, distance_dot: Tensor | None = None
    ) -> tuple[Tensor, Kept]:
        """Features [T, E, G, K]: the value and, for a given distance_dot, the tangent; and what :meth:`backward` needs.

        distance, distance_dot: [E], Å; target_species, source_species: [E].
        """
        w, edges, groups, hidden = self.weights, distance.numel(), self.groups, self.hidden
        tangent = distance_dot is not None
        parts = 2 if tangent else 1
        first = distance.new_empty(groups, parts, edges, hidden)
        width = w.out.shape[1] if self.last else hidden
        out = distance.new_empty(parts, edges, groups, width)
        if not edges:
            return out, Kept(distance, distance_dot, target_species, source_species, first, first, first)
        grid, constants, _ = self._launch(edges, tangent)
        table, slopes, lookup = self.network._first(distance, tangent)
        kernel.first_layer_kernel[grid](
            distance, distance_dot if tangent else distance, target_species, source_species, table, slopes,
            w.target_table, w.source_table, *self.network._norm(0), first, **lookup, **constants,
        )  # fmt: skip
        middle = torch.bmm(first.view(groups, -1, hidden), w.hidden.transpose(1, 2)).view_as(first)
        last = torch.empty_like(first) if self.last else out
        kernel.layer_kernel[grid](
            middle, w.hidden_bias, *self.network._norm(1), last, EDGE_MAJOR=not self.last, **constants
        )
        if self.last:
            for g in range(groups):
                torch.addmm(w.out_bias[g], last[g, 0], w.out[g].t(), out=out[0, :, g])
                if tangent:
                    torch.mm(last[g, 1], w.out[g].t(), out=out[1, :, g])
        kept = Kept(distance, distance_dot, target_species, source_species, first, middle, last)
        return out, kept

    def backward(
        self, grad: Tensor, kept: Kept, weights: bool, distance: bool = True
    ) -> tuple[Tensor, Tensor | None, RadialWeights | None]:
        """Gradients of <grad, features>: by distance [E], by distance_dot [E] if there is one, by the weights.

        grad: [T, E, G, K], as :meth:`forward`'s result. kept: its other one, whose layers are used up. weights: whether
        those of the weights are wanted (else None). distance: whether that by the distance is; without it, what comes
        in its place lacks a term.
        """
        w, edges, groups, hidden = self.weights, kept.distance.numel(), self.groups, self.hidden
        tangent = kept.distance_dot is not None
        if not edges:
            empty = kept.distance.new_empty(0)
            return empty, empty if tangent else None, self._no_gradient() if weights else None
        grad = grad.contiguous()
        parts = grad.shape[0]
        by_out = by_out_bias = None
        if self.last:
            flat = grad.view(parts * edges, groups, -1)
            if weights:
                by_out = self._products([flat[:, g] for g in range(groups)], kept.last)
                by_out_bias = grad[0].sum(0)
            up = kept.last
            for g in range(groups):
                torch.mm(flat[:, g], w.out[g], out=up[g].view(-1, hidden))
        else:
            up = kept.middle
        grid, constants, steps = self._launch(edges, tangent, weights)
        sums = grad.new_empty(grid[0], 5, groups, hidden) if weights else grad  # norm 1, b1, norm 0
        kernel.layer_reverse_kernel[grid](
            up if self.last else grad, kept.middle, w.hidden_bias, *self.network._norm(1), up, sums, steps=steps,
            SUMS=5, EDGE_MAJOR=not self.last, WEIGHTS=weights, **constants,
        )  # fmt: skip
        by_hidden = self._products([up[g].view(-1, hidden) for g in range(groups)], kept.first) if weights else None
        down = kept.first
        torch.bmm(up.view(groups, -1, hidden), w.hidden, out=down.view(groups, -1, hidden))
        by_distance = grad.new_empty(groups, edges)
        by_dot = torch.empty_like(by_distance) if tangent else by_distance
        table, slopes, lookup = self.network._first(kept.distance, True)
        kernel.first_layer_reverse_kernel[grid](
            down, kept.distance, kept.distance_dot if tangent else kept.distance, kept.target_species,
            kept.source_species, table, slopes, w.target_table, w.source_table, *self.network._norm(0), down,
            by_distance, by_dot, sums[:, 3:] if weights else sums, steps=steps, SUMS=5, WEIGHTS=weights,
            STORE=weights or (tangent and distance), **lookup, **constants,
        )  # fmt: skip
        by_distance, by_dot = (x[0] if groups == 1 else x.sum(0) for x in (by_distance, by_dot))
        if tangent and distance:
            self._add_curvature(down, kept.distance, by_distance)
        found = None
        if weights:
            by_norm1, by_bias1, by_hidden_bias, *by_norm0 = sums.sum(0).unbind(0)
            by_basis, by_target, by_source = self._first_layer_gradients(down, kept)
            norms = w.norm0_weight is not None
            found = RadialWeights(
                by_basis, by_target, by_source, *(by_norm0 if norms else (None, None)), by_hidden, by_hidden_bias,
                by_norm1 if norms else None, by_bias1 if norms else None, by_out, by_out_bias,
            )  # fmt: skip
        return by_distance, by_dot if tangent else None, found

    def _no_gradient(self) -> RadialWeights:
        found = RadialWeights(*(None if t is None else torch.zeros_like(t) for t in self.weights))
        return found if self.last else found._replace(out=None, out_bias=None)

    @staticmethod
    def _products(grads: list[Tensor], inputs: Tensor) -> Tensor:
        """Gradients [G, O, h] of the matrices between inputs [G, T, E, h] and results with gradients [T E, O]."""
        out = inputs.new_empty(len(grads), grads[0].shape[1], inputs.shape[-1])
        for g, grad in enumerate(grads):
            torch.mm(grad.t(), inputs[g].view(-1, inputs.shape[-1]), out=out[g])
        return out

    def _first_layer_gradients(self, grad: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of basis [G, h, n_b] and the two tables [Z, G, h] from first_layer_reverse_kernel's result."""
        edges, num_basis, elements = kept.distance.numel(), self.num_basis, self.weights.target_table.shape[0]
        width = 8 * math.ceil((num_basis + 2 * elements) / 8)  # rows that start on 32 bytes
        inputs = grad.new_empty(edges, width)
        tangent = kept.distance_dot is not None
        slopes = grad.new_empty(edges, num_basis) if tangent else inputs
        kernel.inputs_kernel[math.ceil(edges / 16), math.ceil(width / 128)](
            kept.distance, kept.target_species, kept.source_species, inputs, slopes, edges, num_basis, elements, width,
            self.spacing, BE=16, BW=128, TANGENT=tangent,
        )  # fmt: skip
        out = grad.new_empty(width, self.groups, self.hidden)
        for g in range(self.groups):
            torch.mm(inputs.t(), grad[g, 0], out=out[:, g])
            if tangent:
                out[:num_basis, g].addmm_(slopes.t(), grad[g, 1])
        by_target, by_source = out[num_basis : num_basis + 2 * elements].view(2, elements, *out.shape[1:])
        return out[:num_basis].permute(1, 2, 0), by_target, by_source

    def _add_curvature(self, grad: Tensor, distance: Tensor, out: Tensor) -> None:
        """out[e] += <gradient by W0 phi'(d), W0 phi''(d)>."""
        edges, num_basis = distance.numel(), self.num_basis
        x = torch.mm(grad[0, 1], self.weights.basis[0])
        for g in range(1, self.groups):
            x.addmm_(grad[g, 1], self.weights.basis[g])
        padded = next_power(num_basis)
        block = max(2048 // padded, 1)
        kernel.curvature_kernel[(math.ceil(edges / block),)](
            x, distance, out, edges, num_basis, self.spacing, BE=block, BW=padded
        )


def add_gradients(total: RadialWeights | None, more: RadialWeights | None) -> RadialWeights | None:
    """Sum of the gradients of two runs; that of ``total`` is used up."""
    if total is None or more is None:
        return more if total is None else total
    foreach_add_([t for t in total if t is not None], [t for t in more if t is not None])
    return total
