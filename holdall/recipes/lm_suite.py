"""Seventeen small language models of equal size on one corpus: which tokens does each lose to attention?

Zoology's question (Arora et al., 2023, arXiv 2312.04927, table 1), at a size that one GPU trains in hours.
The first seventeen families of holdall/recipes/presets.py have 15 million parameters without embeddings and
read the same 105 million tokens in the same order: 1,600 steps of 64 rows of 1,024. Of five families three
learning rates are tried over 300 steps; the others have 2e-3.
"""

from __future__ import annotations

from holdall.recipes.presets import FAMILIES
from holdall.sweeps import SuiteConfig

PUBLISHED: dict[str, tuple[float, float, float]] = {
    "attention": (9.44, 1.98, 10.62),
    "long-conv": (13.13, 13.27, 13.12),
    "hyena": (10.07, 3.83, 10.75),
    "h3": (10.38, 4.81, 11.00),
    "rwkv": (9.79, 3.82, 10.51),
}
"""Zoology, table 1: perplexity of all tokens, of recall hits and of the others, at about 355 million
parameters after 10 billion tokens of the Pile."""

LATER = ("jrt", "gated-delta-net")
"""Families that are not in it: a model with a prefix predicts only what follows it, half of the tokens, and
the last came after the suite was trained."""


def suite() -> SuiteConfig:
    """Seventeen families at 15 million parameters."""
    return SuiteConfig(
        recipe="lm-suite",
        families=tuple(family for family in FAMILIES if family not in LATER),
        size="15m",
        reference="attention",
        tried=("rwkv", "mamba", "hyena", "attention", "based"),
        tried_rates=(2e-3, 4e-3, 1e-3),
        tried_steps=300,
        learning_rate=2e-3,
        steps=1600,
        context=1024,
        batch=64,
        micro_batch=64,
        warmup=100,
        evaluate_every=400,
        evaluate_rows=317,
    )
