"""The edge-degree embedding's kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from e2former_kernels.common.backend import triton_installed
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.edge_degree import EmbeddingSpec, edge_degree_embedding, edge_degree_embedding_reference

pytestmark = [
    pytest.mark.skipif(not triton_installed(), reason="needs the triton package"),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")


@interpreted
@pytest.mark.parametrize(("lmax", "norms", "chunk"), [(1, True, None), (2, False, 4), (4, True, None)])
def test_equals_the_reference(make, compare, find_leaves, lmax: int, norms: bool, chunk: int | None) -> None:
    edges = make.edges(4, 7, chunk)
    radial = make.radial(lmax + 1, 6, 4, 5, norms)
    arguments = (EmbeddingSpec(lmax, 5, Envelope(3.0)), *edges, radial)
    op = edge_degree_embedding(*arguments)
    reference = edge_degree_embedding_reference(*arguments)
    used = [edges[0], *[t for t in radial[:-2] if t is not None]]
    compare(op, reference, used)
    for a, b in zip(
        torch.autograd.grad(op.square().sum(), find_leaves(arguments), retain_graph=True),
        torch.autograd.grad(reference.square().sum(), find_leaves(arguments)),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-11 * b.abs().max().clamp(min=1)


@interpreted
@pytest.mark.parametrize("edges", [0, 1, 37])
def test_numbers_of_edges(make, edges: int) -> None:
    graph = make.edges(5, edges)
    arguments = (EmbeddingSpec(2, 5, Envelope(3.0)), *graph, make.radial(3, 7, 4, 5))
    op, reference = edge_degree_embedding(*arguments), edge_degree_embedding_reference(*arguments)
    assert (op - reference).abs().max() < 1e-12
    a, b = (torch.autograd.grad(x.sum(), graph[0])[0] for x in (op, reference))
    assert (a - b).abs().sum() < 1e-11


@interpreted
def test_gradgradcheck(make) -> None:
    vec, graph = make.edges(3, 3)
    radial = make.radial(2, 3, 4, 5)
    function = lambda v: edge_degree_embedding(EmbeddingSpec(1, 5, Envelope(3.0)), v, graph, radial)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (vec,), fast_mode=True)
