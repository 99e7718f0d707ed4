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

MODULES = (
    "taylor",
    "taylor_step",
    "read_twice",
    "gated_conv",
    "window_attention",
    "attention_step",
    "selective_scan",
    "linear_attention",
    "by_products",
    "cross_entropy",
)


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
