"""Draws follow the distribution that the settings define, and depend on seed and position alone.

Filters and penalties are held to their papers' words, written here in fp64, and to transformers' classes.
Seeds are fixed, so that a chi-square passes or fails for ever; those with a p-value below 1e-4 fail.

Letters: B rows, V vocabulary.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from holdall.engine import sampling
from holdall.engine.request import Sampling
from holdall.engine.sampling import Occurrences, Settings, draw, kept, penalised, settings_of

DRAWS, LEAST_P = 100_000, 1e-4
INF = math.inf


def logits_of(vocab: int, *, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, vocab)).float()


def repeated(asked: Sampling, rows: int) -> Settings:
    return Settings(*(column_B.expand(rows) for column_B in settings_of([asked])))


def drawn(logits_V: Tensor, asked: Sampling, count: int, *, over: str = "positions") -> Tensor:
    """So many draws from the same logits, at positions, or with seeds, that follow each other."""
    # so few at a time that a processor's cache holds them: five times as fast as 2^23
    filters, rows = sampling.needs_filters(asked), max(1, (1 << 18) // len(logits_V))
    tokens = []
    for at_B in torch.arange(count).split(rows):
        settings, fixed_B = repeated(asked, len(at_B)), torch.full_like(at_B, 11)
        if over == "seeds":
            settings = settings._replace(seed_B=settings.seed_B + at_B)
        position_B = at_B if over == "positions" else fixed_B
        tokens.append(draw(logits_V.expand(len(at_B), -1), position_B, settings, filters=filters))
    return torch.cat(tokens)


def p_value(token_N: Tensor, p_V: np.ndarray) -> float:
    """Of a chi-square test that tokens were drawn with these probabilities; the unlikeliest are one bin."""
    count_V, expected_V = np.bincount(token_N.numpy(), minlength=len(p_V)), p_V * len(token_N)
    assert not count_V[p_V == 0].any()
    rare_V = expected_V < 10
    count, expected = list(count_V[~rare_V]), list(expected_V[~rare_V])
    if rare_V.any() and expected_V[rare_V].sum() > 0:
        count.append(count_V[rare_V].sum())
        expected.append(expected_V[rare_V].sum())
    if len(count) == 1:
        return 1.0
    return float(stats.chisquare(count, expected, sum_check=False).pvalue)


def softmax(z_V: np.ndarray) -> np.ndarray:
    e_V = np.exp(z_V - z_V.max())
    return e_V / e_V.sum()


# ------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("over", ["positions", "seeds"])
@pytest.mark.parametrize(
    ("vocab", "draws"),
    [
        (1, DRAWS),
        (2, DRAWS),
        (50, DRAWS),
        (50_257, 300),
        pytest.param(50_257, DRAWS, marks=pytest.mark.full),
    ],
)
def test_draws_follow_the_softmax(vocab: int, draws: int, over: str) -> None:
    logits_V = logits_of(vocab)
    token_N = drawn(logits_V, Sampling(seed=3), draws, over=over)
    assert p_value(token_N, softmax(logits_V.double().numpy())) > LEAST_P


def test_the_chi_square_sees_a_temperature_that_is_5_percent_off() -> None:
    logits_V = logits_of(50)
    token_N = drawn(logits_V, Sampling(seed=3, temperature=1.05), DRAWS)
    assert p_value(token_N, softmax(logits_V.double().numpy())) < 1e-12


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(seed=1, temperature=0.5),
        Sampling(seed=1, temperature=4.0),
        Sampling(seed=1, temperature=1e30),
        Sampling(seed=1, temperature=0.7, top_k=9),
        Sampling(seed=1, temperature=1.3, top_p=0.8),
        Sampling(seed=1, min_p=0.02),
        Sampling(seed=1, temperature=1.5, top_k=30, top_p=0.9, min_p=0.01),
    ],
    ids=lambda asked: f"{asked.temperature}-{asked.top_k}-{asked.top_p}-{asked.min_p}",
)
def test_draws_follow_what_filters_leave(asked: Sampling) -> None:
    logits_V = logits_of(50, seed=5)
    scaled_V = logits_V.double().numpy() / asked.temperature
    keep_V = definition(scaled_V, asked.top_k, asked.top_p, asked.min_p)
    p_V = softmax(np.where(keep_V, scaled_V, -INF))
    assert p_value(drawn(logits_V, asked, DRAWS), p_V) > LEAST_P


@pytest.mark.parametrize("lag", [1, 2, 64])
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_draws_are_independent_of_those_before(over: str, lag: int) -> None:
    token_N = drawn(logits_of(8, spread=1), Sampling(seed=7), DRAWS, over=over).numpy()
    table = np.zeros((8, 8))
    np.add.at(table, (token_N[lag:], token_N[:-lag]), 1)
    assert stats.chi2_contingency(table).pvalue > LEAST_P


def test_two_seeds_draw_independently_at_all_positions() -> None:
    one, other = (drawn(logits_of(8, spread=1), Sampling(seed=seed), DRAWS).numpy() for seed in (7, 8))
    table = np.zeros((8, 8))
    np.add.at(table, (one, other), 1)
    assert stats.chi2_contingency(table).pvalue > LEAST_P


def test_a_row_draws_the_same_whoever_its_neighbours_are() -> None:
    samplings = [
        Sampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
        for seed, temperature, top_k, top_p in itertools.product((0, 2**62), (0.0, 1.0), (0, 3), (0.5, 1.0))
    ]
    logits_BV = torch.stack([logits_of(50, seed=row) for row in range(len(samplings))])
    position_B = torch.arange(len(samplings)) * 1000
    together_B = draw(logits_BV, position_B, settings_of(samplings))
    alone = [
        int(draw(logits_BV[at : at + 1], position_B[at : at + 1], settings_of([asked])))
        for at, asked in enumerate(samplings)
    ]
    assert together_B.tolist() == alone
    again_B = draw(logits_BV.flip(0), position_B.flip(0), settings_of(samplings[::-1]))
    assert again_B.tolist() == alone[::-1]


def test_rows_without_a_seed_differ() -> None:
    seeds = settings_of([Sampling()] * 100).seed_B
    assert len(set(seeds.tolist())) == 100


# ---------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-30])
def test_at_the_smallest_temperatures_the_likeliest_is_drawn(temperature: float) -> None:
    logits_V = logits_of(50)
    token_N = drawn(logits_V, Sampling(seed=1, temperature=temperature), 1000)
    assert set(token_N.tolist()) == {int(logits_V.argmax())}


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_at_the_largest_temperatures_what_has_a_probability_is_equally_likely(temperature: float) -> None:
    logits_V = logits_of(8)
    logits_V[[2, 5]] = -INF
    token_N = drawn(logits_V, Sampling(seed=1, temperature=temperature), 20_000)
    assert p_value(token_N, softmax(np.where(logits_V == -INF, -INF, 0))) > LEAST_P


def test_huge_logits_are_drawn_by_their_differences() -> None:
    logits_V = torch.tensor([3.0e38, 3.0e38, -3.0e38, 0.0])
    token_N = drawn(logits_V, Sampling(seed=1), 20_000)
    assert p_value(token_N, np.array([0.5, 0.5, 0, 0])) > LEAST_P


@pytest.mark.parametrize(
    "bad", [[0.0, math.nan, 1.0], [0.0, INF, 1.0], [-INF, -INF, -INF], [math.nan, INF, -INF]]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_drawn_from_say_so(bad: list[float], temperature: float) -> None:
    logits_BV = torch.tensor([[0.0, 9.0, 0.0], bad])
    asked = Sampling(seed=1, temperature=temperature, top_p=0.5)
    token_B = draw(logits_BV, torch.tensor([0, 0]), repeated(asked, 2))
    assert token_B.tolist() == [1, -1]


# ------------------------------------------------------------------------------------------------ filters


def definition(z_V: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens are left, bool (V,).

    top_k (Fan et al., arXiv 1805.04833): the k likeliest, with all that are as likely as the last of them.
    top_p (Holtzman et al., arXiv 1904.09751): the smallest set of the likeliest whose probability is at least
    p; of equally likely ones those with smaller ids. min_p (Nguyen et al., arXiv 2407.01082): those of at
    least this share of the likeliest one's probability. Each is applied to what the one before left.
    """
    keep_V = np.ones(len(z_V), bool)
    if top_k:
        keep_V &= z_V >= sorted(z_V)[-min(top_k, len(z_V))]
    p_V = softmax(np.where(keep_V, z_V, -INF))
    if top_p < 1:
        total, nucleus = 0.0, set()
        for token in sorted(range(len(z_V)), key=lambda token: (-p_V[token], token)):
            nucleus.add(token)
            total += p_V[token]
            if total >= top_p:
                break
        keep_V &= [token in nucleus for token in range(len(z_V))]
    return keep_V & (p_V >= min_p * p_V.max())


ROUNDING = 1e-6
"""fp32 sums of at most 50 probabilities are nearer to those in fp64."""


def bounds(z_V: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    """What is left whichever way sums at a limit are rounded, and what may be."""
    surely_V = definition(z_V, top_k, max(top_p - ROUNDING, 0) if top_p < 1 else 1, min_p * (1 + ROUNDING))
    surely_V[z_V.argmax()] = True
    return surely_V, definition(z_V, top_k, top_p + ROUNDING, min_p * (1 - ROUNDING))


KINDS = {
    "normal": logits_of(50),
    "flat": logits_of(50, spread=0.01),
    "steep": logits_of(50, spread=1000),
    "ties": logits_of(50).round(),
    "equal": torch.zeros(50),
    "halves": -math.log(2) * torch.arange(50.0),
    "forbidden": logits_of(50).masked_fill(torch.arange(50) % 3 > 0, -INF),
    "one": torch.full((50,), -INF).index_fill(0, torch.tensor(7), 0.0),
}
FILTERS = list(
    itertools.product(
        (0, 1, 2, 7, 50, 10**6),
        (1e-30, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 1e-12, 1.0),
        (0.0, 1e-6, 0.1, 0.5, 1.0),
    )
)


def left(logits_V: Tensor, filters: Sequence[tuple[int, float, float]]) -> np.ndarray:
    """What `kept` leaves for each of the filters, without tokens that have no probability."""
    samplings = [Sampling(top_k=top_k, top_p=top_p, min_p=min_p) for top_k, top_p, min_p in filters]
    scaled_BV = (logits_V - logits_V.max()).expand(len(filters), -1)
    return (kept(scaled_BV, settings_of(samplings)) & (logits_V > -INF)).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_filters_leave_what_their_papers_say(kind: str) -> None:
    logits_V, undecided = KINDS[kind], 0
    scaled_V = (logits_V - logits_V.max()).double().numpy()
    for filters, left_V in zip(FILTERS, left(logits_V, FILTERS), strict=True):
        surely_V, perhaps_V = (keep_V & (scaled_V > -INF) for keep_V in bounds(scaled_V, *filters))
        assert (surely_V <= left_V).all(), filters
        assert (left_V <= perhaps_V).all(), filters
        undecided += (surely_V != perhaps_V).any()
    # 1 - 1e-6 is always at the limit; where probabilities are round numbers, others are too
    assert undecided <= len(FILTERS) * (0.65 if kind in ("equal", "halves") else 0.3)


@pytest.mark.parametrize("kind", ["normal", "flat", "steep", "forbidden", "one"])
def test_filters_leave_what_transformers_does(kind: str) -> None:
    """Where no tokens tie, which it orders by chance, and no sum is at a limit."""
    logits_V, compared = KINDS[kind], 0
    scaled_V = (logits_V - logits_V.max()).double().numpy()
    for filters, left_V in zip(FILTERS, left(logits_V, FILTERS), strict=True):
        surely_V, perhaps_V = bounds(scaled_V, *filters)
        if (surely_V == perhaps_V).all():
            assert (left_V == of_transformers(logits_V, *filters).numpy()).all(), filters
            compared += 1
    assert compared >= len(FILTERS) * 0.7


def of_transformers(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores_1V, none = logits_V[None].double(), torch.empty(1, 0, dtype=torch.long)
    warpers: list[Any] = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores_1V = warper(none, scores_1V)
    return scores_1V[0] > -INF


def test_filters_of_a_large_vocabulary_are_transformers() -> None:
    logits_V = logits_of(50_257, spread=3)
    filters = [(0, 0.9, 0.0), (1000, 0.95, 0.0), (0, 1.0, 0.01), (40, 0.5, 0.1)]
    for each, left_V in zip(filters, left(logits_V, filters), strict=True):
        assert abs(int(left_V.sum()) - int(of_transformers(logits_V, *each).sum())) <= 1


# ---------------------------------------------------------------------------------------------- penalties


def occurrences(
    prompt: Sequence[int], text: Sequence[int], bias: dict[int, float], vocab: int
) -> Occurrences:
    prompt_V, bias_V = torch.zeros(vocab, dtype=torch.bool), torch.zeros(vocab)
    prompt_V[list(prompt)] = True
    for token, value in bias.items():
        bias_V[token] = value
    count_V = torch.bincount(torch.tensor(text, dtype=torch.long), minlength=vocab).int()
    return Occurrences(prompt_V[None], count_V[None], bias_V[None])


PROMPT, TEXT = [1, 1, 2, 3, 9], [3, 4, 4, 4, 0, 7]
BIAS = {0: 5.0, 1: -0.5, 4: -INF, 8: 0.25}


@pytest.mark.parametrize("repetition", [0.25, 1.0, 1.3, 100.0])
@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (0.7, 0.0), (0.0, -1.5), (2.0, 2.0)])
def test_penalties_are_what_their_authors_say(repetition: float, presence: float, frequency: float) -> None:
    """A bias is added; then Keskar et al.'s (arXiv 1909.05858) theta divides a logit of a token that was
    there, or multiplies one below 0; then OpenAI's: mu - c * frequency - (c > 0) * presence."""
    logits_V = torch.cat((logits_of(9), torch.tensor([0.0, -INF])))
    asked = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    got_1V = penalised(logits_V[None], settings_of([asked]), occurrences(PROMPT, TEXT, BIAS, 11))
    expected = []
    for token, z in enumerate(logits_V.double().tolist()):
        mu = z + BIAS.get(token, 0.0)
        if token in PROMPT or token in TEXT:
            mu = mu / repetition if mu > 0 else mu * repetition
        c = Counter(TEXT)[token]
        expected.append(mu - c * frequency - (c > 0) * presence)
    torch.testing.assert_close(got_1V[0].double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)


def test_the_largest_repetition_penalty_leaves_a_logit_of_zero() -> None:
    """Infinite, it would be NaN."""
    settings, given = settings_of([Sampling(repetition_penalty=1e300)]), occurrences([0, 1], [], {}, 2)
    got_1V = penalised(torch.tensor([[0.0, -2.0]]), settings, given)
    assert got_1V.tolist() == [[0.0, -INF]]


@pytest.mark.parametrize("repetition", [0.5, 1.0, 1.7])
def test_repetition_and_bias_are_transformers(repetition: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

    logits_V, bias = logits_of(11), {0: 5.0, 1: -0.5, 8: 0.25}
    asked = Sampling(repetition_penalty=repetition)
    got_1V = penalised(logits_V[None], settings_of([asked]), occurrences(PROMPT, TEXT, bias, 11))
    ids_1T: Any = torch.tensor([PROMPT + TEXT])
    biased_1V: Any = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
        ids_1T, logits_V[None]
    )
    expected_1V = RepetitionPenaltyLogitsProcessor(repetition)(ids_1T, biased_1V)
    torch.testing.assert_close(got_1V, expected_1V, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draws_are_after_penalties(temperature: float) -> None:
    """Of four equally likely tokens one is forbidden, one was there often, and one is preferred a little."""
    asked = Sampling(
        seed=2, temperature=temperature, presence_penalty=0.5, frequency_penalty=1.0,
        logit_bias=((0, -1e30), (3, 0.4)),
    )  # fmt: skip
    assert sampling.needs_occurrences(asked)
    given = occurrences([], [1, 1], dict(asked.logit_bias), 4)
    rows = 20_000
    token_N = draw(
        torch.zeros(rows, 4), torch.arange(rows), repeated(asked, rows), filters=False,
        occurrences=Occurrences(*(tensor.expand(rows, -1) for tensor in given)),
    )  # fmt: skip
    z_V = np.array([-INF, -2.5, 0.0, 0.4])
    p_V = softmax(z_V / temperature) if temperature else np.eye(4)[3]
    assert p_value(token_N, p_V) > LEAST_P


# ------------------------------------------------------------------------------------------ probabilities


def test_logprobs_are_the_models_own() -> None:
    logits_BV = torch.stack([logits_of(50, seed=row) for row in range(3)])
    token_B = torch.tensor([4, int(logits_BV[1].argmax()), 49])
    expected_BV = torch.log_softmax(logits_BV.double(), -1)
    for row, token in enumerate(sampling.with_logprobs(logits_BV, token_B, 5)):
        assert token.id == token_B[row]
        assert token.logprob == pytest.approx(float(expected_BV[row, token.id]), abs=1e-5)
        best = expected_BV[row].topk(5)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sampling.with_logprobs(logits_BV, token_B, 99)[1].top[0] == (
        token_B[1],
        expected_exact(logits_BV[1]),
    )


def expected_exact(logits_V: Tensor) -> float:
    return float(logits_V.log_softmax(-1).max())


def test_without_noise_the_likeliest_tokens_are_found_as_with_it() -> None:
    """As a step does where no row has a temperature; also among equals, and where logits are NaN."""
    logits_BV = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    logits_BV[7, 3], logits_BV[8, 4], logits_BV[9, 5] = math.nan, math.inf, -math.inf
    cold = settings_of([Sampling(temperature=0, seed=i) for i in range(300)])
    position_B = torch.arange(300)
    plain = draw(logits_BV, position_B, cold, noise=False)
    assert torch.equal(plain, draw(logits_BV, position_B, cold))
    assert plain[[7, 8]].tolist() == [-1, -1]
    assert plain[9] >= 0
