"""Speculative decoding gives the text of the slow generator, whatever is guessed.

In fp64 a call of many tokens and calls of one differ by 1e-15, which no draw here sees. In fp32 the texts are
equal up to a first difference, and there both tokens tie: the scores between which the draw decides differ by
no more than what fp32 does to this model's logits.

Letters: V vocabulary.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

import holdall
from holdall.engine import drafts, slow
from holdall.engine import sampling as draws
from holdall.engine.drafts import Drafted, Drafter, NGrams, SmallerModel, generate_with_drafts, rewound
from holdall.engine.request import Request, Sampling, Token
from holdall.engine.session import Session, read
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig, seeded
from holdall.text.tokenizers import Bytes

WIDTH, TOKENIZER = 16, Bytes()
POSITIONS = 70
MODELS: dict[str, dict[str, Any]] = {
    "based": {
        "layers": (
            BaseConvConfig(width=WIDTH),
            SlidingWindowConfig(width=WIDTH, window=5, heads=2),
            TaylorConfig(width=WIDTH, feature_dim=4, heads=2),
        )
    },
    "replayed": {  # which takes back what was wrong
        "layers": (
            BaseConvConfig(width=WIDTH, replay=8),
            SlidingWindowConfig(width=WIDTH, window=5, heads=2, replay=9),
            TaylorConfig(width=WIDTH, feature_dim=4, heads=2, replay=8),
        )
    },
    "cached": {
        "layers": (AttentionConfig(width=WIDTH, heads=2), BaseConvConfig(width=WIDTH, replay=8)),
        "positions": POSITIONS,
    },
    "mamba": {"layers": (MambaConfig(width=WIDTH, state=4),), "positions": POSITIONS},
    "one": {"layers": (BaseConvConfig(width=WIDTH),)},
    "attention": {"layers": (AttentionConfig(width=WIDTH, heads=2), BaseConvConfig(width=WIDTH))},
}
PROMPT = tuple(b"it is a truth universally acknowledged, that")
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "plain": Sampling(seed=1, logprobs=2),
    "cool": Sampling(seed=2, temperature=0.3, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": Sampling(
        seed=3, temperature=0.5, repetition_penalty=1.5, presence_penalty=1, frequency_penalty=2,
        logit_bias=((101, 3.0),),
    ),
    "stops": Sampling(seed=4, stop_tokens=tuple(range(97, 105)), stop=("e", "ab")),
    "short": Sampling(seed=5, max_tokens=1),
    "nothing": Sampling(seed=6, max_tokens=0),
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, vocab: int = 264) -> Model:
    with seeded(seed):
        model = ModelConfig(vocab=vocab, width=WIDTH, mlp=24, **MODELS[kind]).build()
    for parameter in model.blocks.parameters():  # so that what was read matters
        parameter.data.mul_(3)
    model.embed.weight.data.mul_(20)
    return model.to(dtype).eval()


def definition(model: Model, sampling: Sampling, prompt: Sequence[int] = PROMPT) -> list[Token]:
    pieces = slow.generate(model, TOKENIZER, Request(prompt=tuple(prompt), sampling=sampling))
    return [token for piece in pieces for token in piece.tokens]


def with_drafts(
    model: Model, sampling: Sampling, drafter: Drafter, *, prompt: Sequence[int] = PROMPT, **options: Any
) -> list[Token]:
    session = read(model, prompt)
    found = generate_with_drafts(
        model, session, sampling, drafter, tokenizer=TOKENIZER, prompt=prompt, **options
    )
    return list(found)


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def limited(sampling: Sampling, most: int = POSITIONS - len(PROMPT)) -> Sampling:
    return replace(sampling, max_tokens=min(sampling.max_tokens, most))


class Oracle:
    """Knows the text, and guesses each token wrong with some probability; and how many it guesses varies."""

    def __init__(self, text: Sequence[int], wrong: float, seed: int = 0, *, fewer: bool = True) -> None:
        self.text, self.wrong, self.draw, self.fewer = list(text), wrong, random.Random(seed), fewer
        self.seen: list[int] = []
        self.prompt: Sequence[int] | None = None

    def observe(self, tokens: Sequence[int]) -> None:
        if self.prompt is None:
            self.prompt = tokens
        else:
            self.seen += tokens
        assert self.seen == self.text[: len(self.seen)]

    def propose(self, most: int) -> list[int]:
        count = self.draw.randrange(most + 1) if self.fewer else most
        known = self.text[len(self.seen) : len(self.seen) + count]
        return [token if self.draw.random() >= self.wrong else (token + 1) % 256 for token in known]


class Mute:
    def observe(self, tokens: Sequence[int]) -> None:
        pass

    def propose(self, most: int) -> list[int]:
        return []


# -------------------------------------------------------------------------------------------- the same text


@pytest.mark.parametrize("named", SAMPLINGS)
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *itertools.product(["based", "mamba", "attention"], [0.0, 0.3, 1.0]),
        ("replayed", 0.5),
        ("cached", 0.5),
    ],
)
def test_the_text_is_the_slow_generators_whatever_is_guessed(kind: str, named: str, wrong: float) -> None:
    model, sampling = build(kind), limited(SAMPLINGS[named])
    expected = definition(model, sampling)
    for seed, most in enumerate((1, 3, 8)):
        oracle = Oracle(ids(expected), wrong, seed)
        got = with_drafts(model, sampling, oracle, most=most)
        assert ids(got) == ids(expected)
        assert oracle.prompt == PROMPT
        for one, other in zip(got, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5, nan_ok=True)
            assert [id for id, _ in one.top] == [id for id, _ in other.top]


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["based", "mamba", "attention", "replayed"])
def test_the_text_is_the_slow_generators_with_real_drafters(kind: str, temperature: float) -> None:
    model, sampling = build(kind), limited(Sampling(seed=9, temperature=temperature))
    expected = ids(definition(model, sampling))
    drafters: list[Drafter] = [
        NGrams(shortest=1),
        SmallerModel(build("attention", seed=1), sampling, tokenizer=TOKENIZER),
        SmallerModel(build("mamba", seed=1), sampling, tokenizer=TOKENIZER),
    ]
    for drafter in drafters:
        assert ids(with_drafts(model, sampling, drafter)) == expected


def test_learned_positions_are_used_to_the_last_and_none_beyond_is_guessed() -> None:
    model, sampling = build("mamba"), limited(Sampling(seed=1, ignore_end=True))
    assert len(PROMPT) + sampling.max_tokens == POSITIONS
    assert ids(with_drafts(model, sampling, Fixed([1] * 8))) == ids(definition(model, sampling))


def test_a_text_that_repeats_itself_is_guessed() -> None:
    model, sampling, counts = build("based"), Sampling(temperature=0, max_tokens=400), Drafted()
    got = with_drafts(model, sampling, NGrams(), drafted=counts)
    assert ids(got) == ids(definition(model, sampling))
    assert counts.accepted > 0.5 * counts.proposed > 0
    assert counts.calls < counts.tokens / 2


@pytest.mark.full
def test_in_fp32_texts_differ_only_where_two_tokens_tie() -> None:
    language, different = holdall.load(), 0
    model, wide = language.model, holdall.load().model.double()
    prompt = [TOKENIZER.end, *b"The captain "]
    for seed in range(6):
        sampling = Sampling(seed=seed, temperature=(0.0, 0.8, 1.0)[seed % 3], max_tokens=100)
        expected = ids(definition(model, sampling, prompt))
        got = ids(
            with_drafts(model, sampling, Oracle(expected, 0.3, seed) if seed < 3 else NGrams(), prompt=prompt)
        )
        at = next(
            (i for i, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), None
        )
        if at is None:
            assert len(got) == len(expected)
            continue
        different += 1
        before = [*prompt, *expected[:at]]
        narrow_V, exact_V = (read(each, before).logits_V.double() for each in (model, wide))
        score_V = exact_V / (sampling.temperature or 1)
        if sampling.temperature:
            position = torch.tensor([len(before)])
            score_V = score_V + draws.gumbel(torch.tensor([seed]), position, len(score_V))[0]
        rounding = 4 * float((narrow_V - exact_V).abs().max()) / (sampling.temperature or 1)
        assert abs(float(score_V[got[at]] - score_V[expected[at]])) <= rounding
    assert different <= 1  # or this test would compare little


@torch.no_grad()
def test_texts_with_drafts_have_the_models_distribution() -> None:
    """Of all texts of three tokens among four, against their probabilities, which are the model's."""
    model, prompt, seeds = build("one"), [1, 2], 1000
    model.embed.weight.data.div_(10)
    four = Four()
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = Drafted()
    session = read(model, prompt)
    for seed in range(seeds):
        sampling = Sampling(seed=seed, max_tokens=3, ignore_end=True)
        drafter = Fixed([seed % 4, seed // 4 % 4])
        found = generate_with_drafts(model, session, sampling, drafter, tokenizer=four, drafted=drafted)
        counts[tuple(ids(list(found)))] += 1
    assert 0.1 * drafted.proposed < drafted.accepted < 0.9 * drafted.proposed
    expected = []
    texts = list(itertools.product(range(4), repeat=3))
    for text in texts:
        h, _ = model.hidden(torch.tensor([[*prompt, *text]]))
        log_p = model.logits(h)[0, 1:4, :4].log_softmax(-1)
        expected.append(seeds * float(log_p[range(3), list(text)].sum().exp()))
    assert stats.chisquare([counts[text] for text in texts], expected, sum_check=False).pvalue > 1e-3


class Four(Bytes):
    """A tokenizer of which only four tokens are drawn."""

    vocab, end = 4, 3


class Fixed:
    def __init__(self, guess: list[int]) -> None:
        self.guess = guess

    def observe(self, tokens: Sequence[int]) -> None:
        pass

    def propose(self, most: int) -> list[int]:
        return self.guess[:most]


# ------------------------------------------------------------------------------------------------- the cost


@pytest.mark.parametrize("most", [0, 1, 4])
def test_right_guesses_save_calls(most: int) -> None:
    model, sampling, counts = build("based"), Sampling(seed=1, max_tokens=31, ignore_end=True), Drafted()
    expected = ids(definition(model, sampling))
    with_drafts(model, sampling, Oracle(expected, 0, fewer=False), most=most, drafted=counts)
    assert counts == Drafted(
        tokens=31, calls=-(-30 // (most + 1)), proposed=counts.accepted, accepted=30 - counts.calls
    )


def test_wrong_guesses_cost_no_calls_and_none_is_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling, counts = build("based"), Sampling(seed=1, max_tokens=40, ignore_end=True), Drafted()
    expected, lengths = ids(definition(model, sampling)), list[int]()
    session = read(model, PROMPT)
    hidden = model.hidden

    def counted(tokens_BT: torch.Tensor, *args: Any, **options: Any) -> Any:
        lengths.append(tokens_BT.shape[1])
        return hidden(tokens_BT, *args, **options)

    monkeypatch.setattr(model, "hidden", counted)
    for wrong in (1.0, 0.5):
        lengths.clear()
        counts = Drafted()
        oracle = Oracle(expected, wrong, fewer=False)
        list(
            generate_with_drafts(
                model, session, sampling, oracle, tokenizer=TOKENIZER, most=5, drafted=counts
            )
        )
        assert len(lengths) == counts.calls <= 39
        assert max(lengths) == 6
        assert counts.tokens == 40
        assert (counts.accepted == 0) == (wrong == 1)
    assert counts.calls < 39


@pytest.mark.parametrize("kind", ["based", "replayed"])
def test_a_session_stays_as_it_was(kind: str) -> None:
    model, sampling = build(kind), Sampling(seed=1, max_tokens=30)
    session, again = read(model, PROMPT), read(model, PROMPT)
    for drafter in (Mute(), Oracle(ids(definition(model, sampling)), 0.5)):
        list(generate_with_drafts(model, session, sampling, drafter, tokenizer=TOKENIZER, prompt=PROMPT))
    assert session.past == again.past
    for state, other in zip(session.states, again.states, strict=True):
        for tensor, expected in zip(state, other, strict=True):
            assert torch.equal(tensor, expected)


def test_what_was_wrong_is_taken_back_and_nothing_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling, counts = build("replayed"), Sampling(seed=1, max_tokens=40, ignore_end=True), Drafted()
    expected, places, read_tokens = ids(definition(model, sampling)), set[int](), list[int]()
    hidden = model.hidden

    def counted(tokens_BT: torch.Tensor, *args: Any, **options: Any) -> Any:
        h, after = hidden(tokens_BT, *args, **options)
        places.update(state[0].data_ptr() for state in after)  # type: ignore[union-attr]
        read_tokens.append(tokens_BT.shape[1])
        return h, after

    session = read(model, PROMPT)
    monkeypatch.setattr(model, "hidden", counted)
    oracle = Oracle(expected, 0.4, fewer=False)
    found = generate_with_drafts(
        model, session, sampling, oracle, tokenizer=TOKENIZER, most=5, drafted=counts
    )
    assert ids(list(found)) == expected
    assert sum(read_tokens) == counts.proposed + counts.calls  # each guess, and what was drawn before it
    assert len(places) == len(model.mixers)  # no copies


def test_rewound() -> None:
    model = build("based")
    before = read(model, PROMPT).states
    _, after = model.hidden(torch.tensor([[5, 6, 7]]), before)
    assert after is not None
    assert rewound(before, after, [5, 6, 7], 3) == (after, [])
    assert rewound(before, after, [5, 6, 7], 1) == (before, [5])


# ------------------------------------------------------------------------------------------------- drafters


def test_ngrams_are_looked_up_as_defined() -> None:
    """The longest suffix that was seen before, where it was last; then what followed, again and again."""
    draw = random.Random(0)
    for letters, longest, shortest in ((2, 4, 1), (3, 3, 2), (8, 5, 1)):
        drafter, text = NGrams(longest, shortest), list[int]()
        for _ in range(120):
            drafter.observe([token := draw.randrange(letters)])
            text.append(token)
            for most in (1, 7):
                assert drafter.propose(most) == looked_up(text, longest, shortest, most)
        assert len(drafter.after) <= len(text) * (longest - shortest + 1)


def looked_up(text: list[int], longest: int, shortest: int, most: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for at in range(len(text) - 1, n - 1, -1):
            if text[at - n : at] == text[-n:]:
                whole = list(text)
                for i in range(most):
                    whole.append(whole[at + i])
                return whole[len(text) :]
    return []


def test_the_model_itself_guesses_right_always() -> None:
    model, sampling, counts = (
        build("based"),
        Sampling(seed=7, max_tokens=60, ignore_end=True, top_p=0.8),
        Drafted(),
    )
    with_drafts(model, sampling, SmallerModel(model, sampling, tokenizer=TOKENIZER), most=5, drafted=counts)
    assert counts.accepted == counts.proposed == 49  # 59 after the first, 10 of them drawn after a call
    assert counts.calls == 10


def test_with_other_noise_a_model_guesses_itself_badly() -> None:
    model, sampling, counts = build("based"), Sampling(seed=7, max_tokens=60, ignore_end=True), Drafted()
    other = replace(sampling, seed=8)
    with_drafts(model, sampling, SmallerModel(model, other, tokenizer=TOKENIZER), most=5, drafted=counts)
    assert counts.accepted < counts.proposed / 2


@pytest.mark.parametrize("right", [0, 2, 3, 4])
def test_a_smaller_model_has_read_the_text_whatever_it_guessed(
    right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no right guess twice, but for the last, which it had not read."""
    model, sampling, lengths = build("based"), Sampling(seed=7, ignore_end=True), list[int]()

    def counted(model: Model, tokens: Sequence[int], *args: Any) -> Session:
        lengths.append(len(tokens))
        return read(model, tokens, *args)

    monkeypatch.setattr(drafts, "read", counted)
    drafter = SmallerModel(model, sampling, tokenizer=TOKENIZER)
    drafter.observe(PROMPT)
    guess = drafter.propose(4)
    text = [*guess[:right], (guess[right] + 1) % 256 if right < 4 else 9, 5]
    lengths.clear()
    drafter.observe(text)
    assert lengths == [len(text) - min(right, 3)]
    assert drafter.session is not None
    expected = read(model, [*PROMPT, *text])
    assert drafter.session.past == expected.past
    torch.testing.assert_close(drafter.session.logits_V, expected.logits_V)


def test_a_drafters_session_is_continued() -> None:
    model, sampling, counts = build("based"), Sampling(seed=7, max_tokens=20, ignore_end=True), Drafted()
    session = read(model, PROMPT)
    drafter = SmallerModel(model, sampling, tokenizer=TOKENIZER, session=session)
    list(generate_with_drafts(model, session, sampling, drafter, tokenizer=TOKENIZER, drafted=counts))
    assert counts.accepted == counts.proposed > 0


def test_a_drafter_with_few_positions_ends_with_them() -> None:
    model, sampling, counts = build("based"), Sampling(seed=7, max_tokens=90, ignore_end=True), Drafted()
    expected = ids(definition(model, sampling))
    drafter = SmallerModel(build("mamba"), sampling, tokenizer=TOKENIZER)
    assert ids(with_drafts(model, sampling, drafter, drafted=counts)) == expected
    assert counts.proposed > 0
    long = [1] * (POSITIONS + 1)
    drafter = SmallerModel(build("mamba"), sampling, tokenizer=TOKENIZER)
    assert ids(with_drafts(model, sampling, drafter, prompt=long)) == ids(definition(model, sampling, long))


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("guess", "message"),
    [
        ([1] * 9, "9 tokens where it was asked for at most 8"),
        ([5, 260], "token 1 is 260"),
        ([-1], "token 0 is -1"),
    ],
)
def test_a_guess_that_is_none_is_refused(guess: list[int], message: str) -> None:
    class Wrong(Mute):
        def propose(self, most: int) -> list[int]:
            return guess

    with pytest.raises(ValueError, match=message):
        with_drafts(build("based"), Sampling(seed=1), Wrong())


@pytest.mark.parametrize("logprobs", [None, 1])
def test_logits_that_are_nan_are_refused_after_the_tokens_before(
    logprobs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling = build("based"), Sampling(seed=1, max_tokens=20, ignore_end=True, logprobs=logprobs)
    expected, session, logits = ids(definition(model, sampling)), read(model, PROMPT), model.logits

    def diverged(h_KD: torch.Tensor) -> torch.Tensor:
        return logits(h_KD).index_fill(0, torch.tensor(2), torch.nan)

    monkeypatch.setattr(model, "logits", diverged)
    oracle = Oracle(expected, 0, fewer=False)
    found = generate_with_drafts(model, session, sampling, oracle, tokenizer=TOKENIZER)
    assert ids(list(itertools.islice(found, 3))) == expected[:3]
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(found)


def test_a_smaller_model_needs_the_seed_and_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="seed is None"):
        SmallerModel(build("based"), Sampling(), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="256 tokens, the tokenizer 257"):
        SmallerModel(build("based", vocab=256), Sampling(seed=1), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="longest = 1 must be at least shortest = 2"):
        NGrams(1, 2)
