"""Intervals of scores: a percentile bootstrap over documents, drawn from a seed.

Letters: N documents, U different scores, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
"""250 of them lie beyond either end of a 95% interval."""
AT_ONCE = 1 << 22
"""Documents that are drawn at once."""
FEW = 32
"""Different scores up to which drawing how many documents have each is faster than drawing documents."""


def resampled_means(score_N: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """The means of samples of N documents, drawn from the N with replacement: of length R, in fp64.

    Documents with the same score are drawn as one kind where there are few of them: of N zeros and ones this
    takes the time of two.

    Args:
        score_N: the score of each document; at least one.
        seed: of the resamples; the same seed gives the same means.
        resamples: R.
    """
    draw = np.random.default_rng(seed)
    score_U, count_U = np.unique(score_N, return_counts=True)
    total = len(score_N)
    if len(count_U) <= FEW:
        mean_R: np.ndarray = draw.multinomial(total, count_U / total, resamples) @ score_U / total
        return mean_R
    rows = max(1, AT_ONCE // total)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([score_N[draw.integers(total, size=(size, total))].mean(1) for size in sizes])


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
    mean_R = resampled_means(score_N, seed=seed, resamples=resamples)
    low, high = np.quantile(mean_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
