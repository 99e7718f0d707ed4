"""A small version of figure 2 of "Just read twice", minutes on two cores: the order of two sets, by state.

jrt_figure2.py has the published size.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdall.recipes.jrt_figure2 import both_orders, points
from holdall.sweeps import SweepConfig
from holdall.tasks.data import SetDisjointnessData

VOCAB, STEPS, BATCH = 256, 2400, 32
SIZES = ((16, 4), (32, 4), (32, 8))
"""Width and feature dimension."""
RATES = (0.004, 0.008)
TRAIN = ((2, 8), (4, 16), (4, 64))
TEST = ((4, 16), (4, 64))


def data(steps: int = STEPS, *, vocab: int = VOCAB, passes: int = 1) -> SetDisjointnessData:
    """Rows for so many steps. Raises ValueError for fewer steps than one of each size and order."""
    if steps < 2 * len(TRAIN):
        raise ValueError(f"{steps} steps are fewer than one for each of {2 * len(TRAIN)} sizes of sets")
    rows = BATCH * (steps // (2 * len(TRAIN)))
    return SetDisjointnessData(
        vocab=vocab, reads=passes, train=both_orders(TRAIN, rows), test=both_orders(TEST, 300)
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
        evaluate_every=200,
    )
    return (SweepConfig(recipe="jrt-figure2-small", points=found),)
