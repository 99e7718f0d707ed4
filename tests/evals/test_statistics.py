"""The bootstrap: its definition, both ways of drawing, several questions about a text, the seed, and what it
covers."""

from __future__ import annotations

import numpy as np
import pytest

from holdall.evals.statistics import FEW, RESAMPLES, bootstrap


def by_definition(values: list[float], texts: list[int], seed: int) -> tuple[float, float, float]:
    """One resample at a time: the interval, and the deviation of the means."""
    draw = np.random.default_rng(seed)
    asked = [[v for v, text in zip(values, texts, strict=True) if text == one] for one in sorted(set(texts))]
    means = []
    for _ in range(RESAMPLES):
        drawn = [asked[text] for text in draw.integers(len(asked), size=len(asked))]
        means.append(np.mean(np.concatenate(drawn)))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)), float(np.std(means))


SHARES = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
KINDS = np.random.default_rng(0).integers(4, size=60).tolist()
ANY = np.random.default_rng(0).normal(size=3 * FEW).tolist()


@pytest.mark.parametrize("values", [SHARES, KINDS, ANY])
@pytest.mark.parametrize("about", ["one question a text", "up to three"])
def test_it_is_its_definition(values: list[float], about: str) -> None:
    places = list(range(len(values)))
    texts = places if about == "one question a text" else [place // 3 for place in places]
    low, high = bootstrap(values, texts, seed=1)
    wanted_low, wanted_high, deviation = by_definition(values, texts, 2)
    # of a normal distribution's 2.5% quantile over R draws, the standard error is 0.027 of the deviation at
    # R = 10,000: five times that of the difference of two; a mean of whole numbers moves by 1/N
    spread = 5 * 0.027 * 2**0.5 * deviation
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


@pytest.mark.parametrize("values", [SHARES, KINDS, ANY])
def test_questions_that_repeat_others_about_their_text_say_nothing_more(values: list[float]) -> None:
    texts = list(range(len(values)))
    once = bootstrap(values, texts, seed=1)
    assert once == bootstrap(values, seed=1)
    assert bootstrap(3 * values, [f"text {text}" for text in 3 * texts], seed=1) == pytest.approx(once)
    low, high = bootstrap(3 * values, seed=1)  # as if they were others
    assert high - low < 0.8 * (once[1] - once[0])


def test_the_seed_decides() -> None:
    assert bootstrap(ANY, seed=3) == bootstrap(ANY, seed=3) != bootstrap(ANY, seed=4)


def test_scores_that_are_all_alike_have_no_spread() -> None:
    assert bootstrap([1.0] * 5) == (1.0, 1.0)
    assert bootstrap([0.0]) == (0.0, 0.0)
    assert bootstrap([0.3, 0.3]) == (0.3, 0.3)
    assert bootstrap([0.1] * 4, ["a", "a", "a", "b"]) == (0.1, 0.1)  # 0.1 + 0.1 + 0.1 is more than 0.3


def test_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        bootstrap([])
