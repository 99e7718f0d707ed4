"""A small version of figure 2 of "Just read twice", minutes on two cores: the order of two sets, by state.

jrt_figure2.py has the published size.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdall.recipes.jrt_figure2 import both_orders, points
from holdall.sweeps import SweepConfig
from holdall.tasks.data import SetDisjointnessData

VOCAB, STEPS, BATCH = 68, 1500, 32
SIZES = ((8, 2), (16, 2), (16, 4), (32, 4))
"""Width and feature dimension."""
RATES = (0.008, 0.016)
SETS = ((4, 16),)


def data(steps: int = STEPS, *, vocab: int = VOCAB, passes: int = 1) -> SetDisjointnessData:
    """Rows for so many steps. Raises ValueError for fewer steps than one of each size and order."""
    if steps < 2 * len(SETS):
        raise ValueError(f"{steps} steps are fewer than one for each of {2 * len(SETS)} sizes of sets")
    return SetDisjointnessData(
        vocab=vocab,
        reads=passes,
        distribution="blocked",
        train=both_orders(SETS, BATCH * (steps // (2 * len(SETS)))),
        test=both_orders(SETS, 500),
    )


def sweeps(
    seeds: int = 1,
    *,
    passes: int = 1,
    vocab: int = VOCAB,
    depth: int = 4,
    steps: int = STEPS,
    rates: Sequence[float] = RATES,
    mlp: int = 0,
) -> tuple[SweepConfig, ...]:
    """Both kinds of each size."""
    found = points(
        data(steps, vocab=vocab, passes=passes),
        SIZES,
        seeds,
        batch=BATCH,
        epochs=1,
        rates=rates,
        depth=depth,
        mlp=mlp,
        weight_decay=0.01,
        evaluate_every=250,
    )
    return (SweepConfig(recipe="jrt-figure2-small", points=found),)
