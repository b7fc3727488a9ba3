"""The operations registered with torch.library pass opcheck: schema, autograd, fakes, tracing by torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_installed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
EDGES, HEADS, ROWS = 5, 2, 4
ARGUMENTS = {
    "aggregate": ("edge_heads", "edge_axes", "value"),
    "aggregate_transposed": ("edge_heads", "edge_axes", "outer"),
    "message_weight": ("edge_axes", "value", "outer"),
    "message_scale": ("edge_heads", "value", "outer"),
    "pair_dot": ("query", "key"),
    "pair_to_target": ("edge_heads", "key"),
    "pair_to_source": ("edge_heads", "query"),
    "segment_sum": ("edge_heads",),
    "expand_rows": ("query_heads",),
    "harmonic_sum": ("harmonics", "features"),
    "harmonic_features": ("harmonics", "node_grad"),
    "harmonic_dot": ("features", "node_grad"),
}


def arguments(make, name: str) -> tuple[Tensor | int, ...]:
    _, query, key, _, _, _, source, target, row_ptr, *_ = make.attention(edges=EDGES, heads=HEADS)
    nodes = row_ptr.numel() - 1
    order = torch.argsort(source, stable=True)
    source_ptr = torch.searchsorted(source[order], torch.arange(nodes + 1))
    tensors = {"query": query, "key": key, "query_heads": make(nodes, HEADS), "value": make(nodes, ROWS, HEADS)}
    tensors |= {"outer": make(nodes, 3, ROWS, HEADS), "edge_heads": make(EDGES, HEADS), "edge_axes": make(EDGES, 3)}
    tensors |= {"harmonics": make(EDGES, ROWS), "features": make(EDGES, 2, 3), "node_grad": make(nodes, ROWS, 3)}
    given = tuple(tensors[n] for n in ARGUMENTS[name])
    if name.startswith("harmonic"):
        return (*given, row_ptr, *([2] if name == "harmonic_features" else []))
    if name in ("segment_sum", "expand_rows"):
        return (*given, row_ptr, target)
    return (*given, source, target, row_ptr, order, source_ptr)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(make, name: str) -> None:
    import e2former_kernels.edge_degree.primitives
    import e2former_kernels.equivariant_attention.primitives  # noqa: F401

    torch.library.opcheck(getattr(torch.ops.e2former_kernels, name).default, arguments(make, name))


def test_none_is_forgotten() -> None:
    import e2former_kernels.edge_degree.primitives
    import e2former_kernels.equivariant_attention.primitives  # noqa: F401

    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "e2former_" in n}
    assert registered == set(ARGUMENTS)
