"""Six language models of equal size on the same tokens: what do they recall, read once and read twice?

The families that "Just read twice" (Arora et al., 2024, arXiv 2407.05483) compares, and two newer ones, at 15
and 40 million parameters without embeddings: 78.6 million tokens in the same order, 1,200 steps of 32 rows of
2,048, at one learning rate. JRT-RNN reads the first half of each row in both directions. `holdall eval` then
asks the trained models (docs/evals.md).
"""

from __future__ import annotations

from holdall.sweeps import SuiteConfig

FAMILIES = ("mamba", "jrt", "gated-delta-net", "mamba-2", "based", "attention")
"""The slowest first, so that devices end together."""


def suite(size: str) -> SuiteConfig:
    """The six families at one of the sizes of holdall/recipes/presets.py."""
    return SuiteConfig(
        recipe=f"read-twice-{size}",
        families=FAMILIES,
        size=size,
        reference="attention",
        tried=(),
        tried_rates=(2e-3,),
        tried_steps=300,
        learning_rate=2e-3,
        steps=1200,
        context=2048,
        batch=32,
        micro_batch=32,
        warmup=100,
        evaluate_every=400,
        evaluate_rows=158,
    )
