r"""Operations and bytes that one attention needs, whoever computes it: what TFLOP/s and GB/s refer to.

Per edge, with M = (lmax+1)^2 rows, P path rows, C channels, H heads of width S, radial network n_b -> h -> h -> K:

===============  ==================================================================================================
radial network   R = 2 (n_b h + h^2 + h K)
score            Q = 2 H S
message          A = 2 * 3 M C     (outer product of direction and value, accumulated; 2 M C for order 0)
gathered         G = 4 (M C + H S) (the neighbour's value and key: 13 KB at the paper's shape, mostly from the L2)
===============  ==================================================================================================

Per atom: contraction B = 2 nnz C (nnz coefficients that are not zero), query read and path rows written once.

forward            FLOPs E (R + Q + A) + N B
                   gathered E G
                   streamed 4 N (H S + P C) + E (12 + 16): query, result, edge vectors, indices
forward_backward   gradients by query, key, value and edge vectors, weights frozen. Scores and weights are recomputed
                   and the radial network is differentiated by the distance: FLOPs E (3 R + 4 Q + 3 A) + 2 N B.
                   By receiver it reads value and key once more, by sender the result's gradient and the query: gathered
                   E (2 G + 4 (P C + H S)); streamed three times the forward's, and the gradients of key and value.
second             the forward and backward pass, and the gradient of a functional of those gradients by all inputs and
                   the radial weights. Every product of the backward pass has a factor replaced by its tangent and is
                   transposed: twice the backward pass, plus the radial network's value, tangent and weight gradients of
                   both: FLOPs E (9 R + 12 Q + 9 A) + 6 N B; gathered three times, streamed three times the
                   forward-and-backward figure. An estimate: no kernel is known to reach it.

The dense form needs more: it contracts on every edge (2 P M C) and writes [E, P, C] and [E, M, C]. A spline in place of
the radial network needs less: two knots of 2 K numbers each and some 8 K operations an edge. TFLOP/s here are the work
above divided by the time, the same for all forms: a ratio of two of them is a ratio of times.
"""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("forward", "forward_backward", "second")


class Shape(NamedTuple):
    """Widths of one attention. channels: C. width: S. paths: P. nonzeros: of the coupling. outputs: K."""

    rows: int
    channels: int
    heads: int
    width: int
    paths: int
    nonzeros: int
    basis: int
    hidden: int
    outputs: int
    order: int = 1


class Work(NamedTuple):
    """flops; gathered, streamed: bytes."""

    flops: float
    gathered: float
    streamed: float

    def rates(self, milliseconds: float) -> dict:
        """TFLOP/s, and GB/s of gathers and streams together."""
        return {
            "TFLOPs": self.flops / milliseconds / 1e9,
            "GBs": (self.gathered + self.streamed) / milliseconds / 1e6,
        }

    def floor_ms(self, product_tflops: float, copy_tbs: float) -> float:
        """Least time: operations at the measured product rate, or streamed bytes at the measured copy rate.

        Gathers are left out: how many of them the L2 cache serves depends on the order of the atoms.
        """
        return max(self.flops / product_tflops, self.streamed / copy_tbs) / 1e9


def attention_work(shape: Shape, atoms: int, edges: int, kind: str) -> Work:
    """Work of one attention over ``edges`` edges of ``atoms`` atoms, float32; see the module."""
    s = shape
    radial = 2 * (s.basis * s.hidden + s.hidden**2 + s.hidden * s.outputs)
    score = 2 * s.heads * s.width
    message = 2 * (3 if s.order == 1 else 1) * s.rows * s.channels
    coupling = 2 * s.nonzeros * s.channels if s.order == 1 else 0
    gathered = 4 * (s.rows * s.channels + s.heads * s.width)
    back = 4 * (s.paths * s.channels + s.heads * s.width)
    streamed = 4 * atoms * (s.heads * s.width + s.paths * s.channels) + 28 * edges
    if kind == "forward":
        return Work(edges * (radial + score + message) + atoms * coupling, edges * gathered, streamed)
    both = Work(
        edges * (3 * radial + 4 * score + 3 * message) + 2 * atoms * coupling,
        edges * (2 * gathered + back),
        3 * streamed + 4 * atoms * (s.heads * s.width + s.rows * s.channels),
    )
    if kind == "forward_backward":
        return both
    if kind == "second":
        flops = edges * (9 * radial + 12 * score + 9 * message) + 6 * atoms * coupling
        return Work(flops, 3 * both.gathered, 3 * both.streamed)
    raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def model_work(atoms: int, edges: int, layers: int = 4, shape: Shape | None = None) -> Work:
    """Energy and forces of the paper's network: NOTES.md counts 225 MFLOP an atom node-wise, and the attention here.

    225: 90 forward, as much backward, and half of it recomputed. Nodes are streamed about 15 times a layer.
    """
    shape = shape or PAPER_SHAPE
    one = attention_work(shape, atoms, edges, "forward_backward")
    nodes = 225e6 * layers / 4 * atoms
    passes = 15 * layers * 4 * atoms * shape.rows * shape.channels
    return Work(nodes + layers * one.flops, layers * one.gathered, layers * one.streamed + passes)


#: Of the paper's network; 50 of the coupling's 540 coefficients are not zero.
PAPER_SHAPE = Shape(9, 256, 128, 8, 20, 50, 256, 128, 256)
