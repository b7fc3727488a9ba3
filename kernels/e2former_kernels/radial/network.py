r"""Radial networks without a graph: cuBLAS's matrix products, with row kernels for everything between them.

The value, the change :math:`\dot F = F'(d)\,\dot d` of the features along a change of the distances (the tangent), and
one reverse pass over both, for second derivatives; without a tangent the same pass gives the first ones. Callers pass
edges in chunks of bounded length. In float32 the first layer, a function of
the distance alone, is piecewise cubic with knots made from the weights of the moment (:func:`first_layer_knots`). Sums
over edges are matrix products and partial sums in a fixed order.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_kernels.common.chunks import EdgeChunk
from e2former_kernels.common.tiles import next_power
from e2former_kernels.radial import kernels as kernel
from e2former_kernels.radial.reference import RadialWeights

# Intervals of W0 phi(d) for one distance of two Gaussian centres. Cubic Hermite interpolation of Gaussians
# of width two such distances is then good to 8e-9 of their weights, its slope to 8e-7 (errors h^4/384 and
# h^3 sqrt(3)/216 times the fourth derivative).
KNOTS_PER_CENTRE = 16
# The knots reach this many centre distances beyond the last Gaussian, which is 1e-14 there: exact at any distance.
CENTRES_BEYOND = 16
TILE_NUMBERS = 512  # numbers of one tile of the row kernels, which hold a dozen such tiles: 4 a thread
ALONE_NUMBERS = 2048  # where nothing is kept for tangents and gradients by weights
MAX_PROGRAMS = 4096  # programs that write partial sums of weight gradients, for each network


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


def first_layer_knots(basis: Tensor) -> Tensor:
    """Piecewise cubic of W0 phi(d) for the kernels, [intervals, 4, G, h]: coefficients in the position in the interval.

    basis: W0, [G, h, n_b]. An interval is the distance of two Gaussian centres over ``KNOTS_PER_CENTRE``.
    """
    groups, hidden, num_basis = basis.shape
    pieces = _basis_pieces(num_basis, basis.device)
    knots = pieces @ basis.reshape(groups * hidden, num_basis).to(torch.float64).t()
    return knots.to(basis.dtype).view(-1, 4, groups, hidden)


class Kept(NamedTuple):
    """What the reverse pass takes over: T = 1, or 2 with a tangent."""

    distance: Tensor  # [E]
    distance_dot: Tensor | None  # [E]
    target_species: Tensor
    source_species: Tensor
    middle: Tensor  # [G, T, E, h], products of the middle layer
    first: Tensor | None  # [G, T, E, h], results of the first layer; None where nothing is kept for weights
    last: Tensor | None  # [G, T, E, h], results of the middle layer (nothing without the last linear layer)


class RadialNetwork:
    """Radial networks, evaluated on chunks of edges; their weights are those of the moment.

    cutoff: Å. last: with the last linear layer (K results) or without it (K = h results).
    """

    def __init__(self, weights: RadialWeights, cutoff: float, last: bool = True) -> None:
        self.weights = RadialWeights(*(None if t is None else t.detach().contiguous() for t in weights))
        self.cutoff, self.last = cutoff, last
        self.groups, self.hidden, self.num_basis = weights.basis.shape
        self.spacing = float(cutoff / (self.num_basis - 1))
        self.exact = weights.basis.dtype == torch.float64
        self.knots = self.weights.basis if self.exact else first_layer_knots(self.weights.basis)

    def _launch(self, edges: int, tangent: bool, keep: bool, sums: bool = False) -> tuple[tuple[int, int], dict, int]:
        """Grid and constants of the row kernels, and the tiles of one program."""
        tile, norms = TILE_NUMBERS if keep else ALONE_NUMBERS, self.weights.norm0_weight is not None
        programs = MAX_PROGRAMS if sums else None
        return kernel.row_launch(edges, self.groups, self.hidden, tile, programs, NORM=norms, TANGENT=tangent)

    def _first(self, distance: Tensor, slope: bool) -> tuple[Tensor, Tensor, dict]:
        """Knots, slopes and constants of the first layer's kernels."""
        if not self.exact:
            intervals = self.knots.shape[0]
            scale = (self.num_basis - 1) * KNOTS_PER_CENTRE / self.cutoff
            return self.knots, self.knots, {"intervals": intervals, "scale": scale, "SPLINE": True}
        centre = torch.arange(self.num_basis, dtype=distance.dtype, device=distance.device) * self.spacing
        t = (distance.unsqueeze(-1) - centre) * (0.5 / self.spacing)
        phi = torch.exp(-0.5 * t * t)
        weight = self.weights.basis.transpose(1, 2)
        value = torch.matmul(phi, weight)
        slopes = torch.matmul(phi * t * (-0.5 / self.spacing), weight) if slope else value
        return value, slopes, {"intervals": 1, "scale": 1.0, "SPLINE": False}

    def _norm(self, which: int) -> tuple[Tensor, Tensor]:
        w = self.weights
        if w.norm0_weight is None:
            return w.basis, w.basis
        return (w.norm0_weight, w.norm0_bias) if which == 0 else (w.norm1_weight, w.norm1_bias)

    def forward(
        self,
        distance: Tensor,
        target_species: Tensor,
        source_species: Tensor,
        distance_dot: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, Kept]:
        """Features [T, E, G, K]: the value and, for a given distance_dot, the tangent; and what :meth:`backward` needs.

        distance, distance_dot: [E], Å; target_species, source_species: [E]. keep: what gradients by weights or tangents
        need; without it, and without a tangent, there is the gradient by the distance.
        """
        w, edges, groups, hidden = self.weights, distance.numel(), self.groups, self.hidden
        given = distance, distance_dot, target_species, source_species
        tangent = distance_dot is not None
        first = distance.new_empty(groups, 2 if tangent else 1, edges, hidden)
        width = w.out.shape[1] if self.last else hidden
        if not edges:
            return distance.new_empty(first.shape[1], 0, groups, width), Kept(*given, first, first, first)
        grid, constants, _ = self._launch(edges, tangent, keep)
        knots, slopes, lookup = self._first(distance, tangent)
        kernel.first_layer_kernel[grid](
            distance, distance_dot if tangent else distance, target_species, source_species, knots, slopes,
            w.target_embedding, w.source_embedding, *self._norm(0), first, **lookup, **constants,
        )  # fmt: skip
        middle = torch.bmm(first.view(groups, -1, hidden), w.hidden.transpose(1, 2)).view_as(first)
        last = torch.empty_like(first) if keep else first
        if not self.last:
            last = last.view(-1, edges, groups, hidden)
        kernel.layer_kernel[grid](middle, w.hidden_bias, *self._norm(1), last, EDGE_MAJOR=not self.last, **constants)
        out = last
        if self.last:
            out = distance.new_empty(first.shape[1], edges, groups, width)
            for g in range(groups):
                torch.addmm(w.out_bias[g], last[g, 0], w.out[g].t(), out=out[0, :, g])
                if tangent:
                    torch.mm(last[g, 1], w.out[g].t(), out=out[1, :, g])
        return out, Kept(*given, middle, first, last) if keep else Kept(*given, middle, None, None)

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
        grad, by_out, by_out_bias, up = grad.contiguous(), None, None, kept.middle
        if self.last:
            flat = grad.view(-1, groups, grad.shape[-1])
            if weights:
                by_out = self._products([flat[:, g] for g in range(groups)], kept.last)
                by_out_bias = grad[0].sum(0)
            up = torch.empty_like(kept.middle) if kept.last is None else kept.last
            for g in range(groups):
                torch.mm(flat[:, g], w.out[g], out=up[g].view(-1, hidden))
        grid, constants, tiles = self._launch(edges, tangent, kept.first is not None, weights)
        sums = grad.new_empty(grid[0], 5, groups, hidden) if weights else grad  # norm 1, b1, norm 0
        kernel.layer_reverse_kernel[grid](
            up if self.last else grad, kept.middle, w.hidden_bias, *self._norm(1), up, sums, tiles=tiles, SUMS=5,
            EDGE_MAJOR=not self.last, WEIGHTS=weights, **constants,
        )  # fmt: skip
        by_hidden = self._products([up[g].view(-1, hidden) for g in range(groups)], kept.first) if weights else None
        down = torch.empty_like(up) if kept.first is None else kept.first
        torch.bmm(up.view(groups, -1, hidden), w.hidden, out=down.view(groups, -1, hidden))
        by_distance = grad.new_empty(groups, edges)
        by_dot = torch.empty_like(by_distance) if tangent else by_distance
        knots, slopes, lookup = self._first(kept.distance, True)
        kernel.first_layer_reverse_kernel[grid](
            down, kept.distance, kept.distance_dot if tangent else kept.distance, kept.target_species,
            kept.source_species, knots, slopes, w.target_embedding, w.source_embedding, *self._norm(0), down,
            by_distance, by_dot, sums[:, 3:] if weights else sums, tiles=tiles, SUMS=5, WEIGHTS=weights,
            STORE=weights or (tangent and distance), **lookup, **constants,
        )  # fmt: skip
        by_distance = by_distance[0] if groups == 1 else by_distance.sum(0)
        if tangent:
            by_dot = by_dot[0] if groups == 1 else by_dot.sum(0)
        if tangent and distance:
            self._add_curvature(down, kept.distance, by_distance)
        found = None
        if weights:
            by_norm1, by_bias1, by_hidden_bias, *by_norm0 = sums.sum(0).unbind(0)
            norms = w.norm0_weight is not None
            found = RadialWeights(
                *self._first_layer_gradients(down, kept), *(by_norm0 if norms else (None, None)), by_hidden,
                by_hidden_bias, by_norm1 if norms else None, by_bias1 if norms else None, by_out, by_out_bias,
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
        """Gradients of basis [G, h, n_b] and the two embeddings [Z, G, h] from first_layer_reverse_kernel's result."""
        edges, num_basis, elements = kept.distance.numel(), self.num_basis, self.weights.target_embedding.shape[0]
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


@dataclass(eq=False)
class RadialFeatures:
    """Features of chunks of edges, with gradients by the weights added up over them: None where none are wanted."""

    network: RadialNetwork
    weights_found: tuple[Tensor | None, ...] | None = None

    def forward(
        self,
        chunk: EdgeChunk,
        vec: Tensor,
        distance: Tensor,
        vec_dot: Tensor | None = None,
        distance_dot: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, Kept]:
        """As :meth:`RadialNetwork.forward`, for the edges of a chunk."""
        return self.network.forward(distance, *chunk.elements, distance_dot, keep)

    def backward(
        self, grad: Tensor, kept: Kept, weights: bool, by_vec: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by distance, distance_dot and, for ``add_by_vec``, what else knows of the vectors.

        grad: as the features. weights: whether gradients of the weights are wanted. by_vec: whether the rest is.
        """
        by_distance, by_distance_dot, more = self.network.backward(grad, kept, weights, by_vec)
        self.weights_found = add_gradients(self.weights_found, more)
        return by_distance, by_distance_dot, None

    def found(self) -> list[Tensor]:
        """Gradients by the tensors that the features are made of, all chunks together."""
        return [t for t in self.weights_found or () if t is not None]


def add_gradients(total: RadialWeights | None, more: RadialWeights | None) -> RadialWeights | None:
    """Sum of the gradients of two chunks; that of ``total`` is used up."""
    if total is None or more is None:
        return more if total is None else total
    for a, b in zip(total, more, strict=True):
        if a is not None:
            a += b
    return total
