"""Column sums of a few matrices at once, in a fixed order: gradients by biases, and partial sums of other kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from e2former_kernels.common.backend import triton_problem
from e2former_kernels.common.tiles import ceil_div

AT_ONCE = 5  # matrices of a launch
COLUMNS, ROWS = 128, 16  # of a tile
MAX_PARTS = 64  # partial sums of a column


def column_sums(*matrices: Tensor) -> Sequence[Tensor]:
    """Sums over the rows of up to five matrices [n, width], n of their own, columns side by side in memory.

    Returns as many vectors, parts of one. No gradient.
    """
    first, number = matrices[0], len(matrices)
    if number == 1 or triton_problem(first.device) is not None or not all(x.numel() for x in matrices):
        return [x.sum(0) for x in matrices]
    from e2former_kernels.common.column_sums_kernel import column_sums_kernel  # needs the triton package

    widths, rows = [x.shape[1] for x in matrices], [x.shape[0] for x in matrices]
    steps = ceil_div(max(rows), ROWS * MAX_PARTS)
    missing = AT_ONCE - number
    parts = first.new_empty(ceil_div(max(rows), ROWS * steps), sum(widths))
    column_sums_kernel[parts.shape[0], sum(ceil_div(w, COLUMNS) for w in widths)](
        *matrices, *[first] * missing, *(x.stride(0) for x in matrices), *[0] * missing, *rows, *[0] * missing,
        *widths, *[0] * missing, parts, parts.shape[1], steps, BR=ROWS, BC=COLUMNS, num_warps=4,
    )  # fmt: skip
    return parts.sum(0).split(widths)
