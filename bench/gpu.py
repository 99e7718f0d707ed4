"""Timing on a GPU: ours beside its ceiling and beside what a user would pick instead, in one run.

A case counts the fewest bytes and operations that its result needs; with the card's own copy bandwidth and
matrix rate, measured in the same run, these give the ceiling that no implementation runs below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to do, and the ways to do it.

    what, shape: for the table. bytes: through device memory, each input read and each output written once.
    flops: of the matrix products that the algorithm cannot do without. target_ms: what we want, 0 for none.
    ways: name to a function that does it once; the first is ours.
    """

    what: str
    shape: str
    bytes: float
    flops: float = 0.0
    target_ms: float = 0.0
    ways: dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Ceiling:
    """What this card reaches: bytes per second of its best copy (read and written), and bf16 operations."""

    bandwidth: float
    flops: float

    def seconds(self, case: Case) -> float:
        return max(case.bytes / self.bandwidth, case.flops / self.flops)


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of one call on the GPU, after a warm-up, with the cache emptied between calls.

    The call is captured in a CUDA graph, as training and decoding run it: else a kernel of 0.1 ms would be
    timed by how fast Python launches it. What cannot be captured is timed as it is.
    """
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        # PyTorch up to 2.11 takes the generator for one that still records, and draws nothing more from it
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        return do_bench(function, warmup=50, rep=200, return_mode="median")
    return do_bench(graph.replay, warmup=50, rep=200, return_mode="median")


def ceiling() -> Ceiling:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    by_driver = milliseconds(lambda: b.copy_(a))
    by_kernel = milliseconds(lambda: torch.bitwise_not(a.view(torch.int64), out=b.view(torch.int64)))
    copy = min(by_driver, by_kernel)
    del a, b
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: x @ y)
    return Ceiling(2 * (1 << 30) / copy * 1e3, 2 * 8192**3 / product * 1e3)


def measure(case: Case, limit: Ceiling) -> dict[str, Any]:
    """One line of the table; a way that fails on this shape says why instead of a time."""
    times: dict[str, float | str] = {}
    for name, function in case.ways.items():
        try:
            times[name] = milliseconds(function)
        except Exception as error:
            times[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        torch.cuda.empty_cache()  # which the next way's graph could not do while it is captured
    ours = next(iter(times.values()))
    least = 1e3 * limit.seconds(case)
    return {
        "what": case.what,
        "shape": case.shape,
        "ceiling_ms": least,
        "bound": "memory" if case.bytes / limit.bandwidth >= case.flops / limit.flops else "operations",
        "target_ms": case.target_ms,
        "times_ms": times,
        "share": least / ours if isinstance(ours, float) else None,
    }


def told(ms: float | str) -> str:
    """A time, or why there is none."""
    return f"{ms:.3f}" if isinstance(ms, float) else ms


def table(results: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="kernels, ms (median); share = ceiling / ours")
    for column in ("what", "shape", "ceiling", "ours", "share", "target", "instead"):
        shown.add_column(column, justify="left" if column in ("what", "shape", "instead") else "right")
    for result in results:
        ours, *others = result["times_ms"].items()
        instead = [f"{name} {told(ms)}" for name, ms in others]
        shown.add_row(
            result["what"],
            result["shape"],
            f"{result['ceiling_ms']:.3f}",
            told(ours[1]),
            f"{result['share']:.0%}" if result["share"] else "-",
            f"{result['target_ms']:.3f}" if result["target_ms"] else "-",
            "\n".join(instead),
        )
    return shown


def profile(title: str, step: Callable[[], Any], *, steps: int = 5, top: int = 20) -> Table:
    """The kernels of one step, after a few that warm up, the longest first, and how long the step takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    each = (time.perf_counter() - began) / steps
    with profiled(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [kernel for kernel in seen.key_averages() if kernel.device_time_total > 0]  # no launches
    kernels.sort(key=lambda kernel: -kernel.device_time_total)
    whole = sum(kernel.device_time_total for kernel in kernels)
    count = sum(kernel.count for kernel in kernels) // steps
    shown = Table(
        title=f"{title}: {1e3 * each:.2f} ms, of which {count} kernels take {whole / steps / 1e3:.2f} ms"
    )
    for column in ("share", "us", "times", "kernel"):
        shown.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for kernel in kernels[:top]:
        us = kernel.device_time_total
        shown.add_row(f"{us / whole:.1%}", f"{us / steps:.0f}", str(kernel.count // steps), kernel.key[:100])
    return shown
