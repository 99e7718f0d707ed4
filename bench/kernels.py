"""Every kernel beside its ceiling and beside what a user would pick instead: on a GPU, in one run.

    python -m bench kernels
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bench import gpu

MODULES = ("taylor", "taylor_step", "gated_conv", "window_attention", "selective_scan", "fla", "cross_entropy")


def run(*names: str) -> list[dict[str, Any]]:
    """One result per case, after the card's own ceiling."""
    import importlib

    limit = gpu.ceiling()
    results: list[dict[str, Any]] = [{"what": "ceiling", **dataclasses.asdict(limit)}]
    for name in names or MODULES:
        for case in importlib.import_module(f"bench.{name}").cases():
            results.append(gpu.measure(case, limit))
    return results
