"""Models whose first tokens see each other: the prompt's are read in one piece, whoever reads it.

Letters: T tokens, V vocabulary, P tokens of a prefix.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from engine_checks import TOKENIZER, WIDTH, assert_same, build, definition, requests, texts

from holdall.adapters import hazy
from holdall.analysis.recall import predict
from holdall.engine.fast import Engine, EngineConfig
from holdall.engine.graphs import Desk, DeskReader
from holdall.engine.request import Request, Sampling
from holdall.engine.session import CHUNK, Past, Reader, pieces, read
from holdall.engine.store import StateStore
from holdall.language_model import LanguageModel
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.linformer import LinformerConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import Model
from holdall.ops.kept import Unchanging
from holdall.training.devices import LanguageModelLoss
from holdall.training.language_models import PretrainConfig

P = 24
LAYERS = (
    BaseConvConfig(width=WIDTH),
    PrefixLinearAttentionConfig(width=WIDTH, heads=2, feature_dim=4, prefix=P),
    SlidingWindowConfig(width=WIDTH, heads=2, window=5),
    PrefixLinearAttentionConfig(width=WIDTH, heads=2, feature_dim=4, prefix=P // 2),
)
GREEDY = Sampling(max_tokens=9, temperature=0.0, ignore_end=True)
LENGTHS = [1, 5, P - 1, P, P + 1, 3 * P + 5]


def model_of(dtype: torch.dtype = torch.float64) -> Model:
    return build({"layers": LAYERS}, dtype)


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def close(got_V: torch.Tensor, want_V: torch.Tensor) -> None:
    """Logits of a model in fp64, which a session keeps in fp32; without its prefix they are off by 1e-3."""
    torch.testing.assert_close(got_V, want_V, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def by_hand(model: Model, prompt: tuple[int, ...], count: int) -> list[int]:
    """The prompt in one call, and then token by token."""
    logits_1TV, states = model(torch.tensor([prompt]))
    text = list[int]()
    for _ in range(count):
        text.append(int(logits_1TV[0, -1, : TOKENIZER.vocab].argmax()))
        logits_1TV, states = model(torch.tensor([text[-1:]]), states)
    return text


@pytest.mark.parametrize("chunk", [8, 32, CHUNK])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefix_is_one_piece_and_the_rest_is_cut_behind_it(length: int, chunk: int) -> None:
    sizes = [*pieces(0, length, chunk, prefix=P)]
    assert sizes[0] == min(P, length)
    assert sum(sizes) == length
    assert sizes[1:] == [*pieces(sizes[0], length, chunk)]
    assert [*pieces(3, length + 3, chunk, prefix=P)] == [*pieces(3, length + 3, chunk)]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_text_is_that_of_a_prompt_read_in_one_call(length: int) -> None:
    """From the slow generator, and from the engine, whose pieces are smaller than the prefix."""
    model, prompt = model_of(), prompt_of(length)
    want = by_hand(model, prompt, GREEDY.max_tokens)
    request = Request(prompt=prompt, sampling=GREEDY)
    for found in (
        definition(model, [request]),
        texts(Engine(model, TOKENIZER, EngineConfig(rows=2, chunk=8)).run([request])),
    ):
        assert [token.id for piece in found[1, 0] for token in piece.tokens] == want
    session = read(model, prompt)
    close(session.logits_V, model(torch.tensor([prompt]))[0][0, -1].float())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_desk_reads_the_prefix_of_each_that_sits_at_it(length: int) -> None:
    """There is always a state at a desk, so that it has to be told when a prefix comes."""
    model = model_of()
    desk = Desk(model, Unchanging())
    for prompt in (prompt_of(length), prompt_of(length)[::-1]):
        reader = DeskReader(desk, prompt, None, chunk=8)
        while not reader.done:
            reader.step()
        got, want = reader.session(), read(model, prompt, chunk=8)
        assert got.past == want.past
        close(got.logits_V, want.logits_V)


def test_many_at_once_are_as_one_after_another() -> None:
    model = model_of()
    asked = [dataclasses.replace(each, prompt_logprobs=None) for each in requests(25)]
    for config in (EngineConfig(rows=6), EngineConfig(rows=6, chunk=16, fixed=True)):
        assert_same(texts(Engine(model, TOKENIZER, config).run(asked)), definition(model, asked))


def test_a_mark_within_the_prefix_does_not_cut_it() -> None:
    reader = Reader(model_of(), prompt_of(60), None, marks=[3, P - 1, P, 40])
    assert reader.sizes[::-1][:3] == [P, 8, 8]


def test_a_session_is_found_where_the_prompt_begins_with_the_same_prefix_and_only_there() -> None:
    """What a short prompt read as its prefix is another state than the beginning of a longer one."""
    model = model_of()
    store, prompt = StateStore(fingerprint="abc", model=model), prompt_of(3 * P)
    for length in (P // 2, P, P + 7):
        session = read(model, prompt[:length])
        store.put(session)
        assert session.past in store
        found = store.longest(prompt[:length])
        assert found is not None
        assert found.past == session.past
    found = store.longest(prompt)
    assert found is not None
    assert found.past.count == P + 7  # not that of P / 2, which is no beginning of this
    assert store.longest(prompt[: P - 1]) is None
    assert store.longest(prompt, most=P - 1) is None
    close(read(model, prompt[P + 7 :], found).logits_V, read(model, prompt).logits_V)
    pasts = {Past.beginning(first).after(prompt[:30]).key for first in (0, 1, P)}
    assert len(pasts) == 3


def test_an_engine_with_a_store_gives_the_text_without() -> None:
    model, prompt = model_of(), prompt_of(3 * P)
    asked = [Request(prompt=prompt[:length], sampling=GREEDY) for length in (5, P, P + 9, 5, 2 * P, 3 * P)]
    engine = Engine(model, TOKENIZER, EngineConfig(rows=1), store=StateStore(fingerprint="a", model=model))
    for index, request in enumerate(asked):
        (found,) = texts(engine.run([request])).values()
        want = by_hand(model, request.prompt, GREEDY.max_tokens)
        assert [token.id for piece in found for token in piece.tokens] == want, index
    assert engine.stats().cached_tokens > 0


def test_prompts_are_not_predicted_but_what_follows_a_session_is() -> None:
    model, prompt = model_of(), prompt_of(P + 11)
    asked = Sampling(max_tokens=1, temperature=0.0)
    with pytest.raises(ValueError, match=rf"prompt_logprobs: the first {P} tokens"):
        Engine(model, TOKENIZER).submit(Request(prompt=prompt, sampling=asked, prompt_logprobs=0))
    rest = Request(prompt=prompt[P:], sampling=asked, prompt_logprobs=0, session=read(model, prompt[:P]))
    (found,) = definition(model, [rest]).values()
    logits_TV = model(torch.tensor([prompt]))[0][0]
    want = F.cross_entropy(logits_TV[P - 1 : -1], torch.tensor(prompt[P:]), reduction="none")
    assert [-token.logprob for token in found[0].prompt] == pytest.approx(want.tolist(), abs=1e-5)


def test_a_text_is_scored_after_a_session_alone() -> None:
    model = LanguageModel(model_of(torch.float32), TOKENIZER)
    with pytest.raises(ValueError, match=rf"the first {P} tokens of a document see each other"):
        model.score("It is a truth universally")
    context, text = "It is a truth universally acknowledged, ", "that a man"
    session = model.read(context)
    before = [tensor.clone() for state in session.states for tensor in state]
    score = model.score(text, session=session)
    ids = torch.tensor([TOKENIZER.end, *f"{context}{text}".encode()])
    want = F.cross_entropy(model.model(ids[None, :-1])[0][0], ids[1:], reduction="none")[-len(text) :]
    torch.testing.assert_close(score.log_prob_T, -want.double(), rtol=1e-4, atol=1e-4)
    assert score.ids_T.tolist() == list(text.encode())
    assert model.score("t", session=session).log_prob_T[0] == pytest.approx(float(score.log_prob_T[0]))
    after = [tensor for state in session.states for tensor in state]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="nothing to score"):
        model.score("", session=session)


def test_training_predicts_what_comes_after_the_prefix() -> None:
    """So no token is predicted that its own position has seen: changing it changes its loss alone."""
    model, rows_BN = model_of(torch.float32), torch.tensor([prompt_of(41), prompt_of(41)[::-1]])
    loss = LanguageModelLoss(model, None, recompute=False)(rows_BN)
    logits_BTV = model(rows_BN[:, :-1])[0][:, P - 1 :]
    want = F.cross_entropy(logits_BTV.flatten(0, 1), rows_BN[:, P:].flatten())
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    with pytest.raises(ValueError, match=f"prefix of {P} tokens takes all of a row"):
        PretrainConfig(model=model.config, context_len=P)
    PretrainConfig(model=model.config, context_len=P + 1)
    with pytest.raises(ValueError, match=f"prefix of {P} tokens takes all of a window of {P - 1}"):
        predict(model, rows_BN[:, :P].numpy())
    found = predict(model, rows_BN.numpy())
    log_p_BTV = logits_BTV.detach().log_softmax(-1)
    torch.testing.assert_close(
        torch.from_numpy(found.log_prob), log_p_BTV.gather(2, rows_BN[:, P:, None])[..., 0]
    )


def test_padded_prompts_in_an_engine_are_as_one_after_another_and_no_texts_of_spaces() -> None:
    """Read as the published models read a short prompt; the store takes none for the same tokens as text."""
    layers = (*LAYERS[:3], LAYERS[1])
    model, pad = build({"layers": layers}, torch.float64), 32
    sessions = {length: hazy.read_padded(model, prompt_of(length), pad=pad) for length in LENGTHS}
    asked = [Request(prompt=(), session=session, sampling=GREEDY) for session in sessions.values()]
    assert_same(texts(Engine(model, TOKENIZER, EngineConfig(rows=4)).run(asked)), definition(model, asked))
    store = StateStore(fingerprint="abc", model=model)
    for length, session in sessions.items():
        padding = max(P - length, 0)
        tokens = [pad] * padding + list(prompt_of(length))
        store.put(session)
        found = store.longest(tokens)
        assert (found is None) == bool(padding)
        assert session.past.count == len(tokens)
        plain = read(model, tokens)
        assert (plain.past == session.past) == (not padding)
        assert torch.allclose(plain.logits_V, session.logits_V, atol=1e-4) == (not padding)
    with pytest.raises(ValueError, match=rf"padding token is -1, .* 0 to {model.config.vocab - 1}$"):
        hazy.read_padded(model, [1], pad=-1)
    two = dataclasses.replace(LAYERS[1], prefix=P + 4)
    with pytest.raises(ValueError, match=rf"this model has layers with prefixes of {P}, {P + 4}$"):
        hazy.read_padded(build({"layers": (*LAYERS[:3], two)}), [1], pad=pad)
    with pytest.raises(ValueError, match="nothing to pad"):
        hazy.read_padded(model, [], pad=pad)


def test_a_model_whose_every_call_is_bidirectional_is_refused_by_name() -> None:
    layers = (BaseConvConfig(width=WIDTH), LinformerConfig(width=WIDTH, max_length=64))
    model = build({"layers": layers})
    for use in (
        lambda: read(model, [1, 2]),
        lambda: Engine(model, TOKENIZER),
        lambda: LanguageModel(model, TOKENIZER).score("a"),
        lambda: LanguageModelLoss(model, None, recompute=False),
    ):
        with pytest.raises(ValueError, match="layer 1, linformer of width 16, cannot read a text in pieces"):
            use()
