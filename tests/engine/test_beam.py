"""Beam search against all texts, one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from holdall.engine.beam import Beam, search
from holdall.engine.session import Session, read
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig, seeded
from holdall.text.tokenizers import Bytes


class Letters(Bytes):
    """A tokenizer of so few tokens that all texts can be tried."""

    vocab, end = 5, 4


def build() -> Model:
    layers = (AttentionConfig(width=8), TaylorConfig(width=8, feature_dim=2))
    with seeded(3):
        model = ModelConfig(vocab=8, width=8, layers=layers, mlp=8).build()
    model.embed.weight.data.mul_(60)
    return model.double().eval()


def every_text(model: Model, session: Session, length: int) -> list[Beam]:
    """All texts of at most so many tokens, and what the model makes of each."""
    found = []
    for size in range(1, length + 1):
        for text in itertools.product(range(Letters.vocab), repeat=size):
            ended = text[-1] == Letters.end
            if Letters.end in text[:-1] or (size < length and not ended):
                continue
            logprob, now = 0.0, session
            for token in text:
                logprob += float(now.logits_V[: Letters.vocab].double().log_softmax(-1)[token])
                now = read(model, [token], now)
            found.append(Beam(text, logprob, ended))
    return found


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 0.6])
def test_with_as_many_beams_as_texts_it_finds_the_best(length_penalty: float) -> None:
    model = build()
    session = read(model, [1, 2, 3])
    before = [tensor.clone() for state in session.states for tensor in state]
    texts = every_text(model, session, 3)
    best = sorted(texts, key=lambda beam: -beam.logprob / len(beam.tokens) ** length_penalty)
    found = search(
        model, session, tokenizer=Letters(), beams=200, max_tokens=3, length_penalty=length_penalty
    )
    assert [beam.tokens for beam in found] == [beam.tokens for beam in best]
    assert [beam.ended for beam in found] == [beam.ended for beam in best]
    assert [beam.logprob for beam in found] == pytest.approx([beam.logprob for beam in best], abs=1e-5)
    after = [tensor for state in session.states for tensor in state]
    assert all(map(torch.equal, before, after))


def test_one_beam_is_greedy_and_more_find_what_is_likelier() -> None:
    model = build()
    session, now, text = read(model, [1, 2, 3]), read(model, [1, 2, 3]), list[int]()
    while len(text) < 6 and (not text or text[-1] != Letters.end):
        text.append(int(now.logits_V[: Letters.vocab].argmax()))
        now = read(model, [text[-1]], now)
    options = {"tokenizer": Letters(), "max_tokens": 6, "length_penalty": 0.0}
    greedy, *others = search(model, session, beams=1, **options)
    assert greedy.tokens[: len(text)] == tuple(text) or greedy.ended
    assert not others
    wide = search(model, session, beams=50, **options)
    assert wide[0].logprob >= greedy.logprob
    assert [beam.logprob for beam in wide] == sorted((beam.logprob for beam in wide), reverse=True)


def test_a_text_that_ends_leaves_its_place_to_one_that_goes_on() -> None:
    model = build()
    session = read(model, [1, 2, 3])
    session.logits_V[Letters.end] = session.logits_V.max() + 1  # ends at once, most likely
    options = {"tokenizer": Letters(), "beams": 1, "max_tokens": 4}
    assert search(model, session, length_penalty=0.0, **options)[0].tokens == (Letters.end,)
    (longer,) = search(model, session, length_penalty=9.0, **options)
    assert len(longer.tokens) > 1


def test_numbers_out_of_range_are_named() -> None:
    model = build()
    session = read(model, [1])
    assert search(model, session, tokenizer=Letters(), max_tokens=0) == []
    for wrong in ({"beams": 0}, {"max_tokens": -1}, {"length_penalty": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            search(model, session, tokenizer=Letters(), **wrong)
