"""Tile shapes of the Triton kernels, and Triton itself for files that must load where it is not installed."""

from __future__ import annotations

import functools
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # files with a formula in PyTorch and in Triton side by side: nobody calls these
    triton, tl = SimpleNamespace(jit=lambda function: function), None

__all__ = ["next_power", "row_tiles", "tl", "triton"]


@functools.lru_cache(maxsize=256)  # at every launch, of widths that do not change
def next_power(n: int) -> int:
    """Smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=64)
def row_tiles(rows: int, heads: int, accumulators: int, widest: int = 32, registers: int = 72) -> dict[str, int]:
    """Constants of a kernel with ``accumulators`` tiles of [rows, heads] numbers, at most ``registers`` a thread.

    RA, RB: the rows in two parts whose sizes are powers of two (RB 0: one part). Eighteen rows (lmax 2, two
    channels per head) are 16 + 2 rather than one tile of 32. BH: heads, up to ``widest``. num_warps.
    """
    rows_a = next_power(rows + 1) // 2
    rows_b = next_power(rows - rows_a) if rows > rows_a else 0
    block = min(next_power(heads), widest)
    numbers = accumulators * (rows_a + rows_b) * block
    warps = 1
    while warps < 8 and numbers / (32 * warps) > registers:
        warps *= 2
    return {"RA": rows_a, "RB": rows_b, "BH": block, "num_warps": warps}
