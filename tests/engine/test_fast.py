"""The engine, held to the slow generator: token by token, and bit by bit where every step has all rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from functools import partial
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
    definition,
    requests,
    texts,
)
from engine_checks import build as build_layers

from holdall.engine import slow
from holdall.engine.fast import Engine, EngineConfig
from holdall.engine.graphs import Desk, DeskReader
from holdall.engine.request import Piece, QueueFullError, Request, Sampling
from holdall.engine.session import CHUNK, Reader, Session, read
from holdall.engine.store import StateStore
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model
from holdall.ops.kept import Unchanging
from holdall.precision import compute_in
from holdall.testing import laws

MODELS: dict[str, dict[str, Any]] = {
    "based": {
        "layers": (
            BaseConvConfig(width=WIDTH),
            SlidingWindowConfig(width=WIDTH, window=5, heads=2),
            TaylorConfig(width=WIDTH, feature_dim=4, heads=2),
        )
    },
    "mamba": {"layers": (MambaConfig(width=WIDTH, state=4),), "positions": 2000},
    "attention": {"layers": (AttentionConfig(width=WIDTH, heads=2), BaseConvConfig(width=WIDTH))},
}
CONFIG = EngineConfig(rows=6, max_context=LIMIT)


def build(kind: str, *args: Any, **how: Any) -> Model:
    return build_layers(MODELS[kind], *args, **how)


on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_both
@pytest.mark.parametrize("kind", MODELS)
def test_many_at_once_are_as_one_after_another(kind: str, device: str) -> None:
    """On a GPU every step is a recorded graph, which is what `graphs` counts."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, asked = build(kind).to(device), requests(25)
    engine = Engine(model, TOKENIZER, CONFIG)
    assert_same(texts(engine.run(asked)), definition(model, asked))
    assert bool(engine.buffers.graphs) == (device == "cuda")


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_with_all_rows_in_every_step_neighbours_change_no_bit(
    kind: str, dtype: torch.dtype, device: str
) -> None:
    """Their log-probabilities, and the states at the end, beside neighbours that come and go."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = compute_in(dtype, build(kind, torch.float32).to(device))
    asked = [
        Request(prompt=each.prompt, sampling=Sampling(max_tokens=30, seed=i, logprobs=5), keep=True)
        for i, each in enumerate(requests(12))
    ]
    config = EngineConfig(rows=6, max_context=LIMIT, fixed=True)
    assert_neighbours_change_no_bit(model, config, asked)


@pytest.mark.parametrize("kind", MODELS)
def test_a_session_that_is_continued_is_the_text_that_was_not_interrupted(kind: str) -> None:
    model, engine = build(kind), Engine(build(kind), TOKENIZER, CONFIG)
    whole = Sampling(max_tokens=40, seed=3, ignore_end=True)
    (want,) = texts(engine.run([Request(prompt=(5, 6, 7), sampling=whole)])).values()
    session, prompt, got = None, (5, 6, 7), list[int]()
    for _ in range(4):
        part = Sampling(max_tokens=10, seed=3, ignore_end=True)
        (pieces,) = texts(
            engine.run([Request(prompt=prompt, sampling=part, session=session, keep=True)])
        ).values()
        got += [token.id for piece in pieces for token in piece.tokens]
        session, prompt = pieces[-1].session, ()
    assert got == [token.id for piece in want for token in piece.tokens]
    again = read(model, [5, 6, 7, *got])
    assert session is not None
    assert session.past == again.past
    laws.assert_close("logits of the session", session.logits_V, again.logits_V.to(session.logits_V))


def test_a_long_prompt_holds_up_nobody_by_more_than_a_chunk() -> None:
    model = build("based")
    engine = Engine(model, TOKENIZER, EngineConfig(rows=4, chunk=32))
    first = engine.submit(Request(prompt=(1, 2), sampling=Sampling(max_tokens=100, seed=0, ignore_end=True)))
    engine.step()
    long = engine.submit(Request(prompt=(3,) * 320, sampling=Sampling(max_tokens=3, seed=0)))
    seen = []
    while not seen or all(piece.ticket != long for piece in seen[-1]):
        seen.append(engine.step())
    assert len(seen) >= 10  # a chunk each
    assert all(any(piece.ticket == first for piece in step) for step in seen[1:])


@pytest.mark.parametrize("kind", MODELS)
def test_small_pieces_of_prompts_are_read_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one size, at most a chunk of tokens a step; each prompt's session shares no memory with others."""
    model, sizes = build(kind), list[tuple[int, ...]]()
    hidden = Model.hidden

    def seen(self: Model, tokens_BT: Any, *args: Any, **options: Any) -> Any:
        sizes.append(tuple(tokens_BT.shape))
        return hidden(self, tokens_BT, *args, **options)

    scored = Sampling(max_tokens=0)
    asked = [Request(prompt=(i,) * length, sampling=scored, keep=True, prompt_logprobs=1)
             for i, length in enumerate((22, 22, 22, 6, 1))]  # fmt: skip
    want = definition(model, asked)
    monkeypatch.setattr(Model, "hidden", seen)
    config = EngineConfig(rows=6, max_context=LIMIT, chunk=32)
    engine, got, read_tokens = Engine(model, TOKENIZER, config), list[Piece](), [0]
    for request in asked:
        engine.submit(request)
    while engine.busy:
        got += engine.step()
        read_tokens.append(engine.stats().read_tokens)
    # 22 = 16 + 4 + 2, and 6 = 4 + 2 begins at another place
    assert sizes == [(2, 16), (2, 4), (2, 2), (1, 16), (1, 4), (1, 2), (1, 4), (1, 2), (1, 1)]
    assert read_tokens == [0, 32, 64, 73]
    assert_same(texts(got), want)
    for piece in got:
        assert piece.session is not None
        tensors = [tensor for state in piece.session.states for tensor in state]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    sizes.clear()
    list(Engine(model, TOKENIZER, dataclasses.replace(config, fixed=True)).run(asked))
    assert {rows for rows, _ in sizes} == {1}


@pytest.mark.parametrize("when", [0, 1, 2, 5])
def test_a_cancelled_request_is_gone_after_the_next_step(when: int) -> None:
    engine = Engine(build("based"), TOKENIZER, EngineConfig(rows=2, chunk=16))
    asked = Request(prompt=(9,) * 40, sampling=Sampling(max_tokens=100, seed=0, ignore_end=True), n=2)
    ticket, given = engine.submit(asked), list[Piece]()
    for _ in range(when):
        given += engine.step()
    engine.cancel(ticket)
    last = engine.step()
    assert [(piece.index, piece.finish) for piece in last] == [(0, "cancelled"), (1, "cancelled")]
    assert not engine.busy
    stats = engine.stats()
    assert (stats.running, stats.reading, stats.waiting) == (0, 0, 0)
    engine.cancel(ticket)  # which changes nothing
    assert engine.step() == []


@pytest.mark.parametrize("when", [3, 4, 9])
def test_a_cancelled_text_can_be_continued(when: int) -> None:
    """Its session has read what was given of it, and the rest is as if it had not been interrupted."""
    asked = Sampling(max_tokens=30, seed=0, ignore_end=True)
    engine = Engine(build("based"), TOKENIZER, CONFIG)
    assert_goes_on_after_cancelling(engine, Request(prompt=(9,) * 40, sampling=asked), when)


def test_the_queue_has_an_end() -> None:
    engine = Engine(build("based"), TOKENIZER, EngineConfig(rows=1, queue=2))
    asked = Request(prompt=(1,), sampling=Sampling(max_tokens=2, seed=0))
    for _ in range(2):
        engine.submit(asked)
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(asked)
    assert len(texts(engine.run([asked] * 5))) == 7  # who runs them waits for a place


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (1, 264)}, "prompt: token 1 is 264"),
        ({"n": 0}, "n"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"sampling": Sampling(logit_bias=((257, 1.0),))}, "logit_bias names token 257"),
        ({"sampling": Sampling(stop_tokens=(300,))}, "stop_tokens names token 300"),
        ({"sampling": Sampling(max_tokens=1199), "prompt": (1, 2)}, "max_context 1200"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_its_field(wrong: dict[str, Any], says: str) -> None:
    engine = Engine(build("attention"), TOKENIZER, CONFIG)
    with pytest.raises(ValueError, match=says):
        engine.submit(Request(**{"prompt": (1,), **wrong}))
    assert not engine.busy


def test_a_session_of_another_model_is_refused() -> None:
    engine, other = Engine(build("based"), TOKENIZER, CONFIG), read(build("mamba"), [1, 2])
    with pytest.raises(ValueError, match="session"):
        engine.submit(Request(prompt=(1,), session=other))


def test_rows_that_nobody_has_never_fill_up() -> None:
    engine = Engine(build("attention"), TOKENIZER, EngineConfig(rows=3, max_context=20, fixed=True))
    asked = Sampling(max_tokens=10, seed=0, ignore_end=True)
    for _ in range(4):  # one after another: the other rows run along
        (pieces,) = texts(engine.run([Request(prompt=(1, 2, 3), sampling=asked)])).values()
        assert pieces[-1].usage.completion == 10


def test_a_chat_by_whole_histories_reads_what_is_new() -> None:
    """Ten turns; each says how much of its prompt needed no reading, and continues as if nothing was kept."""
    model = build("based")
    store = StateStore(fingerprint="mine", model=model)
    engine = Engine(model, TOKENIZER, CONFIG, store=store)
    history: tuple[int, ...] = ()
    for turn in range(10):
        draw = random.Random(turn)
        prompt = history + tuple(draw.randrange(256) for _ in range(draw.choice([1, 7, 200])))
        asked = Request(prompt=prompt, sampling=Sampling(max_tokens=12, seed=turn, ignore_end=True))
        (got,) = texts(engine.run([asked])).values()
        assert got[-1].usage == (len(prompt), len(history), 12)
        (want,) = definition(model, [asked]).values()
        text = [token.id for piece in got for token in piece.tokens]
        assert text == [token.id for piece in want for token in piece.tokens]
        history = (*prompt, *text)
    (again,) = texts(engine.run([asked])).values()
    assert again[-1].usage.cached == len(prompt)  # the very prompt: no token is read
    assert [token.id for piece in again for token in piece.tokens] == text


def test_a_shared_beginning_is_read_twice_and_then_never() -> None:
    model = build("based")
    engine = Engine(model, TOKENIZER, CONFIG, store=StateStore(fingerprint="mine", model=model))
    system, cached = tuple(i % 251 for i in range(2 * CHUNK + 40)), []
    for user in range(4):
        asked = Request(prompt=(*system, user, 3, user), sampling=Sampling(max_tokens=2, seed=0))
        (pieces,) = texts(engine.run([asked])).values()
        cached.append(pieces[-1].usage.cached)
    assert cached == [0, 0, 2 * CHUNK, 2 * CHUNK]
    marked = dataclasses.replace(asked, marks=(len(system),), prompt=(*system, 9, 9, 9))
    for want in (2 * CHUNK, len(system)):
        (pieces,) = texts(engine.run([marked])).values()
        assert pieces[-1].usage.cached == want
        marked = dataclasses.replace(marked, prompt=(*system, 8, 8))


def test_states_that_grow_need_a_limit() -> None:
    with pytest.raises(ValueError, match="max_context"):
        Engine(build("attention"), TOKENIZER, EngineConfig())


def test_a_diverged_model_ends_its_text_and_no_other() -> None:
    """Logits are NaN after one token of the vocabulary alone."""
    model = build("based", tied=False)
    model.embed.weight.data[99] = torch.nan
    engine = Engine(model, TOKENIZER, CONFIG)
    asked = Sampling(max_tokens=5, temperature=0, ignore_end=True, logit_bias=((99, -1e9),))
    good, bad = (engine.submit(Request(prompt=prompt, sampling=asked)) for prompt in ((1, 2), (1, 99)))
    found = texts(engine.run([]))
    assert found[bad, 0][-1].finish == "error"
    assert (found[good, 0][-1].finish, found[good, 0][-1].usage.completion) == ("length", 5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(slow.generate(model, TOKENIZER, Request(prompt=(1, 99), sampling=asked)))


def test_the_stats_are_the_tensors() -> None:
    engine = Engine(build("attention"), TOKENIZER, CONFIG)
    tensors = [tensor for state in engine.buffers.states for tensor in state]
    stats = engine.stats()
    assert stats.state_bytes == sum(tensor.nbytes for tensor in tensors) == 6 * stats.row_bytes
    list(engine.run(requests(3, longest=CHUNK + 1)))
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for s in engine.buffers.states for t in s]
    assert engine.stats().prompt_tokens == sum(len(each.prompt) for each in requests(3, longest=CHUNK + 1))


@torch.no_grad()
def test_a_desk_reads_as_a_reader_does_whoever_sat_there_before() -> None:
    model = build("based")
    desk, draw = Desk(model, Unchanging()), random.Random(1)
    texts = [[draw.randrange(TOKENIZER.vocab) for _ in range(length)] for length in (75, 1, 40)]
    begun = read(model, texts[2])
    for tokens, start, marks in ((texts[0], None, (20,)), (texts[1], begun, ()), (texts[0], begun, (3, 70))):
        ours, plain = (
            make(tokens, start, chunk=32, marks=marks)
            for make in (partial(DeskReader, desk), partial(Reader, model))
        )
        assert ours.sizes == plain.sizes
        while not plain.done:
            ours.step()
            plain.step()
            for got, want in zip(_tensors(ours.session()), _tensors(plain.session()), strict=True):
                torch.testing.assert_close(got, want)
        assert ours.session().past == plain.session().past
    kept = ours.session()
    before = [tensor.clone() for tensor in _tensors(kept)]
    DeskReader(desk, texts[1], None).step()
    assert all(map(torch.equal, _tensors(kept), before))
    nothing = DeskReader(desk, (), kept)
    assert nothing.done
    assert nothing.session().states is kept.states


def _tensors(session: Session) -> list[torch.Tensor]:
    return [session.logits_V, *itertools.chain(*session.states)]


@pytest.mark.gpu
def test_prompts_read_by_graphs_are_those_of_the_slow_one() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, asked = build("based").to("cuda"), requests(12, longest=700)
    engine = Engine(model, TOKENIZER, dataclasses.replace(CONFIG, rows=4))
    assert engine.warm_up() > 10
    assert engine.desk is not None
    recorded = len(engine.desk.graphs)
    assert_same(texts(engine.run(asked)), definition(model, asked))
    assert len(engine.desk.graphs) == recorded
