"""Every registered mixer on the quick recipe's task: the accuracies of docs/zoo.md.

Two layers, a short convolution and then the mixer with its default options, apart from what follows:
lengths for which filters and positions are made, and state sizes that published defaults set for models a
hundred times as wide.
"""

from __future__ import annotations

from typing import Any

from holdall import mixers
from holdall.recipes import quick
from holdall.sweeps import SweepConfig

LONGEST = quick.data().longest
OPTIONS: dict[str, dict[str, Any]] = {
    "cosformer": {"max_length": LONGEST},
    "gss": {"modes": 64},
    "hyena": {"max_length": LONGEST},
    "linformer": {"max_length": LONGEST},
    "long-conv": {"max_length": LONGEST},
    "monarch-mixer": {"max_length": LONGEST},
    "prefix-linear-attention": {"prefix": 32},
    "s5": {"state": 64},
}


def sweeps(seeds: int = 1) -> tuple[SweepConfig, ...]:
    """One point per mixer; those of a user's own, if loaded before, among them."""
    points = []
    for name in mixers.names():
        entry = mixers.entry(name)
        config = entry.configure(width=quick.WIDTH, **OPTIONS.get(name, {}))
        points.append(quick.point(name, entry.family, config, seeds))
    return (SweepConfig(recipe="zoo", points=tuple(points)),)
