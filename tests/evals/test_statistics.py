"""The bootstrap: its definition, both ways of drawing, the seed, and what it covers."""

from __future__ import annotations

import numpy as np
import pytest

from holdall.evals.statistics import FEW, RESAMPLES, bootstrap


def by_definition(values: list[float], seed: int) -> tuple[float, float]:
    """One resample at a time."""
    draw = np.random.default_rng(seed)
    means = [np.mean(draw.choice(values, size=len(values))) for _ in range(RESAMPLES)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


SHARES = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
KINDS = np.random.default_rng(0).integers(4, size=60).tolist()
ANY = np.random.default_rng(0).normal(size=3 * FEW).tolist()


@pytest.mark.parametrize("values", [SHARES, KINDS, ANY])
def test_it_is_its_definition(values: list[float]) -> None:
    low, high = bootstrap(values, seed=1)
    wanted_low, wanted_high = by_definition(values, 2)
    # of a normal distribution's 2.5% quantile over R draws, the standard error is 0.027 of the deviation at
    # R = 10,000: five times that of the difference of two; a mean of whole numbers moves by 1/N
    spread = 5 * 0.027 * 2**0.5 * np.std(values) / len(values) ** 0.5
    if values is not ANY:
        spread += 1 / len(values)
    assert low == pytest.approx(wanted_low, abs=spread)
    assert high == pytest.approx(wanted_high, abs=spread)
    assert low < np.mean(values) < high


def test_it_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = bootstrap((draw.random(100) < 0.3).astype(float).tolist(), resamples=1000)
        covered += low <= 0.3 <= high
    # 95% of 300 is 285, with a standard deviation of 4; the percentile bootstrap covers a little less
    assert 269 <= covered <= 297


def test_the_seed_decides() -> None:
    assert bootstrap(ANY, seed=3) == bootstrap(ANY, seed=3) != bootstrap(ANY, seed=4)


def test_scores_that_are_all_alike_have_no_spread() -> None:
    assert bootstrap([1.0] * 5) == (1.0, 1.0)
    assert bootstrap([0.0]) == (0.0, 0.0)
    assert bootstrap([0.3, 0.3]) == (0.3, 0.3)


def test_no_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="no documents"):
        bootstrap([])
