"""torch-geometric's scatter and segment against the reference's own, value with first and second derivative, on a CPU.

    python benchmarks/pyg.py

docs/architecture.md has what this printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch_geometric.utils import scatter, segment

from e2former_kernels.common.sums import segment_max, segment_sum

NODES, DEGREE, REPEATS = 1000, 40, 15


def derivatives(function: Callable[[Tensor], Tensor], values: Tensor) -> list[Tensor]:
    """Value, gradient, and gradient of a function of the gradient."""
    values = values.detach().requires_grad_()
    out = function(values)
    (first,) = torch.autograd.grad((out**3).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), values)
    return [out.detach(), first.detach(), second]


def seconds(function: Callable[[Tensor], Tensor], values: Tensor) -> float:
    """Of one run."""
    start = time.perf_counter()
    derivatives(function, values)
    return time.perf_counter() - start


torch.manual_seed(0)
target = torch.randint(NODES, (NODES * DEGREE,)).sort().values
pointer = torch.searchsorted(target, torch.arange(NODES + 1))
scores = torch.randn(len(target), 8, dtype=torch.float64)
messages = torch.randn(len(target), 9, 64, dtype=torch.float64)
total = lambda x: segment_sum(x, target, NODES)  # noqa: E731
largest = lambda x: segment_max(x, target, NODES)  # noqa: E731
cases = (
    ("scatter sum, messages", messages, total, lambda x: scatter(x, target, 0, NODES)),
    ("scatter sum, scores", scores, total, lambda x: scatter(x, target, 0, NODES)),
    ("scatter max, scores", scores, largest, lambda x: scatter(x, target, 0, NODES, "max")),
    ("scatter max, equal scores", scores.round(), largest, lambda x: scatter(x, target, 0, NODES, "max")),
    ("segment sum, scores", scores, total, lambda x: segment(x, pointer)),
)
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {NODES} receivers, {len(target)} edges, float64")
for name, values, ours, theirs in cases:
    try:
        got = derivatives(theirs, values)
    except RuntimeError as err:
        print(f"{name}: {str(err).splitlines()[0]}")
        continue
    same = [torch.allclose(a, b, 1e-12, 1e-12) for a, b in zip(derivatives(ours, values), got, strict=True)]
    bits = all(map(torch.equal, got, derivatives(theirs, values)))
    ours_ms, theirs_ms = (  # in turn, because other programs come and go
        1000 * min(column)
        for column in zip(*[(seconds(ours, values), seconds(theirs, values)) for _ in range(REPEATS)], strict=True)
    )
    print(f"{name}: ours {ours_ms:.1f} ms, PyG {theirs_ms:.1f} ms, as ours {same}, same bits twice {bits}")
