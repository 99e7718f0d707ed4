"""What tests of the engine hold: small models, requests of all kinds, and the slow generator's answers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from holdall.engine import slow
from holdall.engine.fast import Engine, EngineConfig
from holdall.engine.request import Piece, Request, Sampling
from holdall.model import Model, ModelConfig, seeded
from holdall.testing import laws
from holdall.text.tokenizers import Bytes, Tokenizer

WIDTH, TOKENIZER = 16, Bytes()
LIMIT = 1200
"""Of tokens in a row of an engine."""


def build(kind: Mapping[str, Any], dtype: torch.dtype = torch.float64, *, tied: bool = True) -> Model:
    """A model of layers, and perhaps learned positions, in which what was read matters."""
    config = ModelConfig(vocab=TOKENIZER.vocab + 7, width=WIDTH, mlp=24, tied=tied, **kind)
    with seeded(0):
        model = config.build()
    for block in model.blocks:
        for parameter in block.parameters():
            parameter.data.mul_(3)
    model.embed.weight.data.mul_(20)
    return model.to(dtype).eval()


def requests(count: int, seed: int = 0, *, longest: int = 90, keep: bool = False) -> list[Request]:
    """Requests of all kinds."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        asked = Sampling(
            max_tokens=draw.choice([0, 1, 2, 17, 40]),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            top_k=draw.choice([0, 0, 5]),
            top_p=draw.choice([1.0, 0.9]),
            min_p=draw.choice([0.0, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.5]),
            logit_bias=draw.choice([(), ((65, 4.0), (66, -100.0))]),
            seed=index,
            stop=draw.choice([(), ("e", "a b")]),
            stop_tokens=draw.choice([(), (7, 8, 9, 10, 200, 201)]),
            logprobs=draw.choice([None, 0, 3]),
        )
        prompt = tuple(
            draw.randrange(TOKENIZER.vocab) for _ in range(draw.choice([1, 3, 31, 32, 33, longest]))
        )
        told = draw.choice([None, None, 2])
        found.append(
            Request(prompt=prompt, sampling=asked, n=draw.choice([1, 1, 3]), keep=keep, prompt_logprobs=told)
        )
    return found


def texts(pieces: Iterable[Piece]) -> dict[tuple[int, int], list[Piece]]:
    """The pieces of each text, by ticket and index."""
    found: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        found.setdefault((piece.ticket, piece.index), []).append(piece)
    return found


def definition(
    model: Model, asked: Sequence[Request], tokenizer: Tokenizer = TOKENIZER
) -> dict[tuple[int, int], list[Piece]]:
    pieces = (slow.generate(model, tokenizer, each, ticket=i + 1) for i, each in enumerate(asked))
    return texts(piece for each in pieces for piece in each)


def assert_same(got: dict[Any, list[Piece]], want: dict[Any, list[Piece]]) -> None:
    assert got.keys() == want.keys()
    for name, right in want.items():
        text, mine = "".join(p.text for p in got[name]), got[name]
        assert text == "".join(p.text for p in right), name
        assert [t.id for p in mine for t in p.tokens] == [t.id for p in right for t in p.tokens], name
        assert (mine[-1].finish, mine[-1].usage) == (right[-1].finish, right[-1].usage), name
        assert [p.finish for p in mine[:-1]] == [""] * (len(mine) - 1)
        for part in ("tokens", "prompt"):
            pairs = zip(*([t for p in each for t in getattr(p, part)] for each in (mine, right)), strict=True)
            for one, other in pairs:
                assert one.id == other.id
                assert one.logprob == pytest.approx(other.logprob, abs=1e-5, nan_ok=True)
                assert [i for i, _ in one.top] == [i for i, _ in other.top]


def assert_goes_on_after_cancelling(engine: Engine, request: Request, when: int) -> None:
    """A text that is cancelled after so many steps has a session, after which comes the rest of the whole."""
    (whole,) = texts(engine.run([request])).values()
    ticket, given = engine.submit(dataclasses.replace(request, keep=True)), list[Piece]()
    for _ in range(when):
        given += engine.step()
    engine.cancel(ticket)
    given += engine.step()
    done = [token.id for piece in given for token in piece.tokens]
    session = given[-1].session
    assert session is not None
    assert session.past.count == len(request.prompt) + len(done)
    rest = dataclasses.replace(request.sampling, max_tokens=request.sampling.max_tokens - len(done))
    (more,) = texts(engine.run([Request(prompt=(), sampling=rest, session=session)])).values()
    want = [token.id for piece in whole for token in piece.tokens]
    assert done + [token.id for piece in more for token in piece.tokens] == want


def assert_neighbours_change_no_bit(model: Model, config: EngineConfig, asked: Sequence[Request]) -> None:
    """Hold each text, its log-probabilities and its last state to be those that it has alone in an engine.

    `asked` are requests of one text each that keep their sessions; their neighbours come and are cancelled.
    """
    alone = [texts(Engine(model, TOKENIZER, config).run([each])) for each in asked]
    engine, draw, given, places = Engine(model, TOKENIZER, config), random.Random(1), list[Piece](), {}
    for i, each in enumerate(asked):
        others = [engine.submit(other) for other in requests(2, seed=i)]
        places[engine.submit(each)] = i
        for _ in range(draw.randrange(8)):
            given += engine.step()
        engine.cancel(draw.choice(others))
    while engine.busy:
        given += engine.step()
    beside = texts(given)
    for ticket, i in places.items():
        (mine,) = alone[i].values()
        assert [piece.tokens for piece in mine] == [piece.tokens for piece in beside[ticket, 0]]
        ends = [each[-1].session for each in (mine, beside[ticket, 0])]
        assert ends[0].past == ends[1].past
        laws.assert_bitwise("logits", ends[1].logits_V, ends[0].logits_V)
        for one, other in zip(*(end.states for end in ends), strict=True):
            for name, x, y in zip(type(one)._fields, one, other, strict=True):
                laws.assert_bitwise(name, y, x)
