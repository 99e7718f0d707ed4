"""Every kernel beside its ceiling and beside what a user would pick instead: on a GPU, in one run.

python -m bench kernels
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import gpu

MODULES = {
    "taylor": ["taylor"],
    "taylor_step": ["taylor_step"],
    "read_twice": ["taylor"],
    "gated_conv": ["gated_conv"],
    "window_attention": ["window_attention"],
    "attention_step": ["attention"],
    "selective_scan": ["selective_scan", "diagonal_scan"],
    "linear_attention": ["fla", "strong_decay"],
    "by_products": ["by_products"],
    "cross_entropy": ["cross_entropy"],
}
"""Modules of cases, and the tests in tests/kernels of what each measures."""


def gates(*names: str) -> list[str]:
    """Paths of the tests of some modules, of all of tests/kernels by default."""
    if not names:
        return ["tests/kernels"]
    return sorted({f"tests/kernels/test_{tests}.py" for name in names for tests in MODULES[name]})


def run(*names: str) -> Iterator[dict[str, Any]]:
    """One result per case, after the card's own ceiling.

    A module makes its cases one after another: each has the card's memory for itself.
    """
    limit, progress = gpu.ceiling(), Console(stderr=True)
    yield dataclasses.asdict(limit)
    for name in names or MODULES:
        for case in importlib.import_module(f"bench.{name}").cases():
            result = gpu.measure(case, limit)
            ours = next(iter(result["times_ms"].values()))
            progress.print(f"{case.what}, {case.shape}: {gpu.told(ours)} ms", highlight=False)
            yield result


def table(results: Sequence[dict[str, Any]]) -> Table:
    limit, *cases = results
    shown = gpu.table(cases)
    shown.caption = (
        f"copy {limit['bandwidth'] / 1e12:.2f} TB/s read and written, "
        f"8192^3 bf16 product {limit['flops'] / 1e12:.0f} TFLOP/s"
    )
    return shown
