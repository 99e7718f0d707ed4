"""Intervals of scores: a percentile bootstrap over documents, drawn from a seed.

Letters: N documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 1 << 22
"""Values that are drawn at once."""


def bootstrap(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """The interval in which a share `level` of the means of resampled documents lie.

    Args:
        values: the score of each document.
        seed: of the resamples; the same seed gives the same interval.
        resamples: how many times N documents are drawn, with replacement, from the N.

    Returns:
        The lower and upper bound. Where all documents have one score, both are that score: the bootstrap then
        says nothing of how far the mean of others could be from it.

    Raises ValueError if there is no document.
    """
    score_N = np.asarray(values, dtype=np.float64)
    if not score_N.size:
        raise ValueError("no documents, so no interval")
    draw = np.random.default_rng(seed)
    if ((score_N == 0) | (score_N == 1)).all():
        # the number of right answers among N draws is binomial, which needs no drawing one by one
        mean_R = draw.binomial(score_N.size, score_N.mean(), size=resamples) / score_N.size
    else:
        rows = max(1, AT_ONCE // score_N.size)
        sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        mean_R = np.concatenate(
            [score_N[draw.integers(score_N.size, size=(size, score_N.size))].mean(1) for size in sizes]
        )
    low, high = np.quantile(mean_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
