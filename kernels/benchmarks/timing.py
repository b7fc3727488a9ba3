"""Time and peak memory of a call, eager and as the replay of a CUDA graph. A call that fails is a row that says why."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

GIB = 1 << 30
#: Calls before the timed ones: the second makes tables of frozen weights, the third captures CUDA graphs, and the
#: fourth is the first replay.
WARMUP = 4
#: Seconds of timed calls after which no further repeat starts.
PATIENCE = 20.0


def failure(error: BaseException) -> dict:
    """Row of a call that failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"error": "out of memory"}
    text = str(error).strip().splitlines()
    return {"error": f"{type(error).__name__}: {text[0] if text else ''}"[:300]}


def free() -> None:
    """Give unused memory back, after a failed call too, whose frames held tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attempt(function: Callable[[], dict]) -> dict:
    """The row that ``function`` returns, or what went wrong."""
    try:
        row = function()
    except Exception as error:
        row = failure(error)
    free()
    return row


def measure(function: Callable[[], object], repeats: int = 5, warmup: int = WARMUP) -> dict:
    """Median and least time of a call in ms, and peak memory in GiB above what there was before the first call.

    On a GPU times are between CUDA events around the call, so they contain what the host needs longer; on the CPU they
    are wall clock and memory is left out. GiB counts what warm-up calls left behind: tables of frozen weights, and
    memory that captured CUDA graphs hold whether or not a replay is running.
    """
    return attempt(lambda: _measure(function, repeats, warmup))


def _measure(function: Callable[[], object], repeats: int, warmup: int) -> dict:
    gpu = torch.cuda.is_available()
    free()
    synchronize()
    before = torch.cuda.memory_allocated() if gpu else 0
    idle = torch.cuda.memory_reserved() - before if gpu else 0
    start = time.perf_counter()
    for _ in range(warmup):
        function()
        synchronize()
    first = time.perf_counter() - start
    free()
    row: dict = {}
    if gpu:
        # freed blocks that empty_cache could not return belong to the pools of captured graphs
        held = max(torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - idle, 0)
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1e3 * PATIENCE:
        times.append(_once(function, gpu))
    row |= {"ms": statistics.median(times), "min_ms": min(times), "repeats": len(times), "warmup_s": round(first, 2)}
    if gpu:
        row["GiB"] = (torch.cuda.max_memory_allocated() - before + held) / GIB
        row["total_GiB"] = (torch.cuda.max_memory_allocated() + held) / GIB
    return row


def _once(function: Callable[[], object], gpu: bool) -> float:
    if not gpu:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def measure_graph(function: Callable[[], object], repeats: int = 10, gib: float = 0.0) -> dict:
    """``graph_ms``: median time of replaying ``function`` from a CUDA graph, what the GPU needs without the host.

    The call must not wait for the GPU and must fit once more in the memory that is left (gib: its peak). Where it does
    not, or on a machine without a GPU, the row says so (``graph_error``). Both are found out before a capture starts: a
    capture that fails half way may leave the allocator unable to return memory, and later rows would run out of it.
    """
    if not torch.cuda.is_available():
        return {"graph_error": "no GPU"}
    free()
    left = torch.cuda.mem_get_info()[0] / GIB
    if 1.1 * gib + 1.0 > left:
        return {"graph_error": f"needs {gib:.1f} GiB, {left:.1f} are left"}
    row = attempt(lambda: _measure_graph(function, repeats))
    return {"graph_error": row["error"]} if "error" in row else row


def _measure_graph(function: Callable[[], object], repeats: int) -> dict:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(side):
        function()
        try:
            torch.cuda.set_sync_debug_mode("error")
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # nothing cached is given back while a graph is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    for _ in range(2):
        graph.replay()
    times = [_once(graph.replay, True) for _ in range(repeats)]
    del graph
    return {"graph_ms": statistics.median(times)}


def ceilings(device: str, channels: int = 256) -> dict:
    """What this GPU reaches: device-to-device copy (TB/s, read and written) and a product of the network's shape.

    ``product_TFLOPs`` follows ``torch.get_float32_matmul_precision()``.
    """
    if device == "cpu":
        return {}
    a, b = (torch.empty(1 << 28, device=device) for _ in range(2))
    copy = _measure(lambda: b.copy_(a), 10, 3)["ms"]
    x, w = torch.randn(9, 6144, channels, device=device), torch.randn(9, channels, 8 * channels, device=device)
    product = _measure(lambda: torch.bmm(x, w), 10, 3)["ms"]
    return {
        "copy_TBs": 2 * a.numel() * 4 / copy / 1e9,
        "product_TFLOPs": 2 * x.numel() * 8 * channels / product / 1e9,
    }
