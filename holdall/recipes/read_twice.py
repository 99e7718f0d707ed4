"""Six language models of equal size on the same tokens: what do they recall, read once and read twice?

The families that "Just read twice" (Arora et al., 2024, arXiv 2407.05483) compares, and Gated DeltaNet, at 15
and 40 million parameters without embeddings, on the same tokens in the same order: steps of 32 rows of 2,048.
JRT-RNN reads the first half of each row in both directions. `holdall eval` then asks the trained models
(docs/evals.md).
"""

from __future__ import annotations

from holdall.sweeps import SuiteConfig

FAMILIES = ("mamba", "mamba-2", "gated-delta-net", "based", "jrt", "attention")
"""The slowest first, so that devices end together."""
TRAINED = {"15m": (4e-3, 2000), "40m": (2e-3, 1200)}
"""Learning rate and steps by size. At 0.002 the Taylor layers of 40 million parameters recalled nothing yet
after these steps (results/read-twice); those of 15 million did after 100 million tokens of another text at
0.004 (results/lm-suite)."""
TRIED: dict[str, tuple[float, ...]] = {"15m": (2e-3, 4e-3), "40m": (2e-3,)}
"""Learning rates of attention, of which it takes the better after 300 steps if there are several: with 15
million parameters it ended at a perplexity of 54 at 0.002 and of 73 at 0.004."""


def suite(size: str) -> SuiteConfig:
    """The six families at one of the sizes of holdall/recipes/presets.py."""
    learning_rate, steps = TRAINED[size]
    return SuiteConfig(
        recipe=f"read-twice-{size}",
        families=FAMILIES,
        size=size,
        reference="attention",
        tried=("attention",) if len(TRIED[size]) > 1 else (),
        tried_rates=TRIED[size],
        tried_steps=300,
        learning_rate=learning_rate,
        steps=steps,
        context=2048,
        batch=32,
        micro_batch=32,
        warmup=100,
        evaluate_every=400,
        evaluate_rows=158,
    )
