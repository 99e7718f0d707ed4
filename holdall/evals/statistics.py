"""Intervals of scores: a percentile bootstrap over texts, drawn from a seed.

Questions about one text are not independent: a text that a model cannot read makes all of them hard. So texts
are drawn, each with all its questions (the cluster bootstrap; Miller, "Adding error bars to evals", 2024,
arXiv 2411.00640). Where each question has a text of its own, this is the usual bootstrap over questions.

Letters: N questions, G texts, U kinds of texts, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
"""250 of them lie beyond either end of a 95% interval."""
AT_ONCE = 1 << 22
"""Texts that are drawn at once."""
FEW = 32
"""Kinds of texts up to which drawing how many there are of each is faster than drawing texts."""


def resampled_means(
    score_N: np.ndarray,
    text_N: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """The mean scores of samples of G texts, drawn from the G with replacement: of length R, in fp64.

    Texts with the same sum of scores and as many questions are drawn as one kind where there are few kinds:
    of N zeros and ones this takes the time of two.

    Args:
        score_N: the score of each question; at least one.
        text_N: the text that each is about; without it, each has one of its own.
        seed: of the resamples; the same seed gives the same means.
        resamples: R.
    """
    draw = np.random.default_rng(seed)
    sum_G2 = _by_text(score_N, text_N)  # of scores, and of questions
    sum_U2, count_U = np.unique(sum_G2, axis=0, return_counts=True)
    texts = len(sum_G2)
    if len(count_U) <= FEW:
        sum_R2 = draw.multinomial(texts, count_U / texts, resamples) @ sum_U2
    else:
        rows = max(1, AT_ONCE // texts)
        sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        drawn = (draw.integers(texts, size=(size, texts)) for size in sizes)
        sum_R2 = np.concatenate([np.stack([sum_G2[at, k].sum(1) for k in (0, 1)], 1) for at in drawn])
    mean_R: np.ndarray = sum_R2[:, 0] / sum_R2[:, 1]
    return mean_R.clip(score_N.min(), score_N.max())  # which sums are rounded out of


def _by_text(score_N: np.ndarray, text_N: Sequence[Hashable] | None) -> np.ndarray:
    """Of each text, in the order in which they first come, the sum of its scores and its questions."""
    if text_N is None:
        return np.stack([score_N, np.ones(len(score_N))], 1)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(text_N))}
    place_N = [numbers[text] for text in text_N]
    return np.stack([np.bincount(place_N, score_N), np.bincount(place_N)], 1)


def bootstrap(
    values: Sequence[float],
    texts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval in which a share `level` of the means of resampled texts lie.

    Args:
        values: the score of each question.
        texts: the text that each is about; without it, each has one of its own.
        seed: of the resamples; the same seed gives the same interval.
        resamples: how many times the texts are drawn, with replacement, as many as there are.

    Returns:
        The lower and upper bound. Where all questions have one score, both are that score: the bootstrap then
        says nothing of how far the mean of others could be from it.

    Raises ValueError if there is no question.
    """
    score_N = np.asarray(values, dtype=np.float64)
    if not score_N.size:
        raise ValueError("no questions, so no interval")
    mean_R = resampled_means(score_N, texts, seed=seed, resamples=resamples)
    low, high = np.quantile(mean_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
