"""The engine with drafts, held to the slow generator; and its lookup to the n-grams of one text.

In fp64 a call of several tokens and calls of one differ by 1e-15, which no draw here sees.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from engine_checks import (
    LIMIT,
    TOKENIZER,
    WIDTH,
    assert_goes_on_after_cancelling,
    assert_neighbours_change_no_bit,
    assert_same,
    build,
    definition,
    requests,
    texts,
)
from torch import Tensor

from holdall.engine import lookup
from holdall.engine.drafts import NGrams
from holdall.engine.fast import Engine, EngineConfig
from holdall.engine.request import Request, Sampling
from holdall.engine.session import Session, read
from holdall.engine.store import StateStore
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.testing import laws
from holdall.text.tokenizers import Bytes

MODELS: dict[str, dict[str, Any]] = {
    "replayed": {
        "layers": (
            BaseConvConfig(width=WIDTH, replay=9),
            SlidingWindowConfig(width=WIDTH, window=5, heads=2, replay=9),
            TaylorConfig(width=WIDTH, feature_dim=4, heads=2, replay=9),
        )
    },
    "cached": {
        "layers": (AttentionConfig(width=WIDTH, heads=2), BaseConvConfig(width=WIDTH, replay=9)),
        "positions": 2000,
    },
}
CONFIG = EngineConfig(rows=6, max_context=LIMIT, drafts=4)
both = pytest.mark.parametrize("kind", MODELS)
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Four(Bytes):
    """A tokenizer of which only four tokens are drawn, so that any guess is right now and then."""

    vocab, end = 4, 3


@pytest.fixture
def lots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Guesses by lot among four tokens, in some rows; counts them."""
    generator, made = torch.Generator().manual_seed(0), list[int]()

    def drawn(recent_BR: Tensor, most: int) -> Tensor:
        guess_BK = torch.randint(4, (len(recent_BR), most), generator=generator)
        made.append(guess_BK.numel())
        return guess_BK.masked_fill(torch.rand(len(guess_BK), 1, generator=generator) < 0.2, lookup.NOTHING)

    monkeypatch.setattr(lookup, "guesses", drawn)
    return made


def repetitive(count: int) -> list[Request]:
    """Texts that repeat themselves, of all kinds, so that much is guessed right."""
    found = []
    for i, asked in enumerate(requests(count, seed=1)):
        prompt = tuple((b"one two three " * 20)[i : i + 60])
        cold = dataclasses.replace(
            asked.sampling, temperature=0.0, repetition_penalty=1.0, frequency_penalty=0.0
        )
        found.append(dataclasses.replace(asked, prompt=prompt, sampling=cold if i % 2 else asked.sampling))
    return found


# -------------------------------------------------------------------------------------------- the same text


@on_both
@pytest.mark.parametrize(
    ("kind", "drafts"),
    [
        ("replayed", 4),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("cached", 4), ("replayed", 1))),
    ],
)
def test_many_at_once_are_as_one_after_another(kind: str, drafts: int, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, asked = build(MODELS[kind]).to(device), [*requests(8), *repetitive(8)]
    engine = Engine(model, TOKENIZER, dataclasses.replace(CONFIG, drafts=drafts))
    assert_same(texts(engine.run(asked)), definition(model, asked))
    assert bool(engine.buffers.graphs) == (device == "cuda")
    stats = engine.stats()
    assert stats.drafted > stats.accepted > 0


@both
def test_whatever_is_guessed_the_text_is_the_same(kind: str, lots: list[int]) -> None:
    """Rows accept from none to all of their guesses, beside each other, and texts end within a step."""
    model, four = build(MODELS[kind]), Four()
    model.embed.weight.data.div_(10)
    asked = []
    for i, each in enumerate(requests(12)):
        sampling = dataclasses.replace(
            each.sampling,
            stop=(),
            stop_tokens=((), (2,))[i % 4 == 0],
            ignore_end=i % 3 > 0,
            logit_bias=((1, 0.5),),
        )
        asked.append(dataclasses.replace(each, sampling=sampling))
    engine = Engine(model, four, CONFIG)
    assert_same(texts(engine.run(asked)), definition(model, asked, four))
    stats = engine.stats()
    assert 0.05 * stats.drafted < stats.accepted < 0.6 * stats.drafted
    assert 0 < stats.drafted < sum(lots)


@pytest.mark.full
@both
def test_64_rows(kind: str) -> None:
    model, asked = build(MODELS[kind]), [*requests(60), *repetitive(60)]
    engine = Engine(model, TOKENIZER, dataclasses.replace(CONFIG, rows=64))
    assert_same(texts(engine.run(asked)), definition(model, asked))


def test_right_guesses_save_steps() -> None:
    model, counts = build(MODELS["replayed"]), []
    asked = Request(
        prompt=tuple(b"one two " * 20), sampling=Sampling(temperature=0, max_tokens=300, ignore_end=True)
    )
    for drafts in (0, 4):
        engine = Engine(model, TOKENIZER, dataclasses.replace(CONFIG, drafts=drafts))
        list(engine.run([asked]))
        counts.append(engine.stats())
    plain, drafted = counts
    assert drafted.tokens == plain.tokens == 300
    assert plain.drafted == 0
    # but for the first two and the last, each step gives a token more than it accepted
    assert 300 - drafted.accepted <= drafted.steps <= 303 - drafted.accepted
    assert drafted.steps < plain.steps / 2


def test_what_is_guessed_beyond_a_text_s_end_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(MODELS["replayed"])
    asked = Request(prompt=(1, 2), sampling=Sampling(seed=0, max_tokens=9, ignore_end=True))
    (pieces,) = definition(model, [asked]).values()
    right = torch.tensor([[token.id for piece in pieces for token in piece.tokens][1:5]])
    monkeypatch.setattr(lookup, "guesses", lambda recent_BR, most: right.expand(len(recent_BR), -1))
    engine = Engine(model, TOKENIZER, CONFIG)
    short = dataclasses.replace(asked.sampling, max_tokens=3)
    (pieces,) = texts(engine.run([dataclasses.replace(asked, sampling=short)])).values()
    assert [len(piece.tokens) for piece in pieces] == [1, 2]
    assert engine.stats()[-3:] == (3, 4, 2)


@both
def test_with_all_rows_in_every_step_neighbours_change_no_bit(kind: str) -> None:
    model = build(MODELS[kind], torch.float32)
    asked = [
        Request(
            prompt=each.prompt,
            sampling=Sampling(max_tokens=30, seed=i, logprobs=5, temperature=0.3),
            keep=True,
        )
        for i, each in enumerate(repetitive(6))
    ]
    assert_neighbours_change_no_bit(model, dataclasses.replace(CONFIG, fixed=True), asked)


# ------------------------------------------------------------------------------------------------- sessions


@both
def test_a_session_has_read_the_text_and_no_more(kind: str, lots: list[int]) -> None:
    """A text ends within a step, by its length, a token or a string; then it goes on in the same engine."""
    model, four = build(MODELS[kind]), Four()
    model.embed.weight.data.div_(10)
    engine = Engine(model, four, CONFIG)
    asked = [
        Request(
            prompt=(1, 2, 3, i), keep=True,
            sampling=Sampling(seed=i, max_tokens=4 + i % 9, ignore_end=True, stop_tokens=((), (2,))[i % 2]),
        )
        for i in range(18)
    ]  # fmt: skip
    ends: list[tuple[Session, Session]] = []
    for (ticket, _), pieces in texts(engine.run(asked)).items():
        text, session = [t.id for piece in pieces for t in piece.tokens], pieces[-1].session
        assert session is not None
        ends.append((session, read(model, [*asked[ticket - 1].prompt, *text])))
    for session, want in ends:
        assert session.past == want.past
        laws.assert_close("logits", session.logits_V, want.logits_V.to(session.logits_V))
        for mine, other in zip(session.states, want.states, strict=True):
            assert [t.shape for t in mine] == [t.shape for t in other]
    more = Sampling(seed=9, max_tokens=12, ignore_end=True)
    got, right = (
        texts(engine.run([Request(prompt=(), sampling=more, session=session) for session in sessions]))
        for sessions in zip(*ends, strict=True)
    )
    for mine, other in zip(got.values(), right.values(), strict=True):
        assert [t.id for p in mine for t in p.tokens] == [t.id for p in other for t in p.tokens]


@both
@pytest.mark.parametrize("when", [2, 3, 4, 9])
def test_a_cancelled_text_can_be_continued(kind: str, when: int) -> None:
    engine = Engine(build(MODELS[kind]), TOKENIZER, CONFIG)
    asked = Sampling(max_tokens=60, temperature=0, ignore_end=True)
    assert_goes_on_after_cancelling(engine, Request(prompt=tuple(b"ab " * 15), sampling=asked), when)
    assert engine.stats().accepted > 0


def test_a_chat_by_whole_histories_reads_what_is_new() -> None:
    model = build(MODELS["replayed"])
    engine = Engine(model, TOKENIZER, CONFIG, store=StateStore(fingerprint="mine", model=model))
    history: tuple[int, ...] = ()
    for turn in range(5):
        prompt = history + tuple(b"more and more " * (turn + 1))
        asked = Request(prompt=prompt, sampling=Sampling(max_tokens=30, temperature=0, ignore_end=True))
        (got,) = texts(engine.run([asked])).values()
        assert got[-1].usage == (len(prompt), len(history), 30)
        (want,) = definition(model, [asked]).values()
        text = [token.id for piece in got for token in piece.tokens]
        assert text == [token.id for piece in want for token in piece.tokens]
        history = (*prompt, *text)


# --------------------------------------------------------------------------------------- limits, bad numbers


def test_texts_use_all_of_their_room_and_rows_that_nobody_has_never_fill_up() -> None:
    model = build(MODELS["cached"])
    engine = Engine(model, TOKENIZER, EngineConfig(rows=3, max_context=60, fixed=True, drafts=4))
    prompt = tuple(b"again and again and again and ")
    for _ in range(3):
        asked = Sampling(max_tokens=30, temperature=0, ignore_end=True)
        (pieces,) = texts(engine.run([Request(prompt=prompt, sampling=asked)] * 1)).values()
        assert pieces[-1].usage.completion == 30


def test_a_diverged_model_ends_its_text_and_no_other() -> None:
    model = build(MODELS["replayed"], tied=False)
    model.embed.weight.data[99] = torch.nan
    engine = Engine(model, TOKENIZER, CONFIG)
    asked = Sampling(max_tokens=20, temperature=0, ignore_end=True, logit_bias=((99, -1e9),))
    prompts = ((1, 2, 1, 2, 1, 2), (1, 99))
    good, bad = (engine.submit(Request(prompt=prompt, sampling=asked, keep=True)) for prompt in prompts)
    found = texts(engine.run([]))
    assert found[bad, 0][-1].finish == "error"
    assert (found[good, 0][-1].finish, found[good, 0][-1].usage.completion) == ("length", 20)


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (
            "replayed",
            {"drafts": 5},
            "drafts = 5 need a model that takes back 11 tokens, and layer 0, base-conv",
        ),
        ("mamba", {"drafts": 1}, r"layer 0, mamba of width 16, takes back 0: .*with_replay\(3\)"),
        ("cached", {"drafts": 4, "max_context": 1993}, "lower max_context to 1992"),
        ("replayed", {"drafts": -1}, "drafts"),
    ],
)
def test_what_a_model_cannot_do_is_refused(kind: str, config: dict[str, Any], says: str) -> None:
    models = {**MODELS, "mamba": {"layers": (MambaConfig(width=WIDTH, state=4),)}}
    with pytest.raises(ValueError, match=says):
        Engine(build(models[kind]), TOKENIZER, EngineConfig(**config))


def test_addresses_stay() -> None:
    engine = Engine(build(MODELS["cached"]), TOKENIZER, CONFIG)
    buffers = engine.buffers
    before = [t.data_ptr() for s in buffers.states for t in s] + [buffers.recent_BR.data_ptr()]
    list(engine.run(repetitive(4)))
    assert [t.data_ptr() for s in buffers.states for t in s] + [buffers.recent_BR.data_ptr()] == before


# --------------------------------------------------------------------------------------------------- lookup


def test_rows_are_looked_up_as_one_text_is() -> None:
    draw, rows = random.Random(0), 7
    recent_BR = torch.full((rows, 300), lookup.NOTHING)
    drafters = [NGrams(lookup.LONGEST, lookup.SHORTEST) for _ in range(rows)]
    for _ in range(60):
        new = [[draw.randrange(2 + row) for _ in range(5)] for row in range(rows)]
        counts = [draw.randrange(6) for _ in range(rows)]
        recent_BR = lookup.remembered(recent_BR, torch.tensor(new), torch.tensor(counts))
        for most in (1, 6):
            got = lookup.guesses(recent_BR, most).tolist()
            for row, drafter in enumerate(drafters):
                if most == 1:
                    drafter.observe(new[row][: counts[row]])
                assert got[row] == (drafter.propose(most) or [lookup.NOTHING] * most)


def test_what_is_older_than_what_is_remembered_is_not_found() -> None:
    text = [1, 2, 3, *range(10, 40), 1, 2]
    for slots, want in ((len(text), 3), (len(text) - 1, lookup.NOTHING)):
        assert lookup.guesses(torch.tensor([text[-slots:]]), 1).tolist() == [[want]]
