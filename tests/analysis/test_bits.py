"""Recall from states in fewer bits: what is rounded, when, and what is counted."""

import pytest
import torch
from torch import Tensor

from holdall.analysis.bits import accuracy, hidden, state_bits
from holdall.contract import Format, pack
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.linformer import LinformerConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import Model, ModelConfig
from holdall.tasks.data import Questions

CONFIG = ModelConfig(
    vocab=32,
    width=16,
    layers=(
        BaseConvConfig(width=16),
        DeltaNetConfig(width=16, heads=2),
        SlidingWindowConfig(width=16, window=4),
    ),
    positions=64,
)


def build(config: ModelConfig = CONFIG) -> Model:
    torch.manual_seed(0)
    return config.build().eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_in_fp32_the_pieces_are_the_whole() -> None:
    model, tokens_BN = build().double(), tokens(3, 13)
    whole_BND, states = model.hidden(tokens_BN)
    for every in (1, 5, 13, 20):
        # a state in fp64 is stored in fp32, and so rounded
        h_BND, _ = hidden(model, tokens_BN, Format("fp32"), every=every)
        torch.testing.assert_close(h_BND, whole_BND, atol=1e-5, rtol=0)
    assert states is not None


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 4])
def test_states_are_rounded_between_pieces_and_never_within_one(every: int) -> None:
    """By hand: each piece reads what the piece before left in int4."""
    model, tokens_BN = build(), tokens(3, 10)
    states, wanted = None, []
    for start in range(0, 10, every):
        h_BTD, after = model.hidden(tokens_BN[:, start : start + every], states)
        assert after is not None
        states = [pack(state, Format("int4")).unpack() for state in after]
        wanted.append(h_BTD)
    h_BND, bits = hidden(model, tokens_BN, Format("int4"), every=every)
    assert torch.equal(h_BND, torch.cat(wanted, dim=1))
    assert bits == sum(pack(state, Format("int4")).bits_per_row for state in states or [])
    exact_BND, _ = hidden(model, tokens_BN, Format("fp32"), every=every)
    moved = (h_BND - exact_BND).abs().amax((0, 2))
    assert not moved[:every].any()  # the first piece read no state
    assert (moved[every:] > 1e-4).all()


@torch.no_grad()
def test_accuracy_is_the_share_of_answers_that_are_right() -> None:
    model, tokens_BN = build(), tokens(6, 12)
    at_BQ = torch.tensor([[3, 11], [0, 7], [5, 6], [11, 2], [9, 9], [1, 10]])
    h_BND, _ = hidden(model, tokens_BN, Format("int4"))
    said_BQ = model.logits(h_BND).argmax(-1).gather(1, at_BQ)
    answer_BQ = said_BQ.clone()
    answer_BQ[:3, 0] = (answer_BQ[:3, 0] + 1) % 32
    assert accuracy(model, Questions(tokens_BN, at_BQ, answer_BQ), Format("int4")) == 9 / 12


def test_stochastic_rounding_is_a_function_of_its_seed() -> None:
    model, tokens_BN = build(), tokens(4, 12)

    def read(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return hidden(model, tokens_BN, Format("int4", "stochastic"), generator=generator)[0]

    assert torch.equal(read(0), read(0))
    assert not torch.equal(read(0), read(1))


def test_bits_are_counted_after_the_context() -> None:
    model = build(ModelConfig(vocab=32, width=16, layers=(AttentionConfig(width=16, heads=2),)))
    for length in (1, 9):
        keys_and_values = 2 * length * 2  # heads
        assert state_bits(model, length, Format("fp32")) == 64 + keys_and_values * 8 * 32
        assert state_bits(model, length, Format("int4")) == 64 + keys_and_values * (8 * 4 + 8)
        assert state_bits(model, length, Format("fp32")) == 8 * model.state_bytes(length)


def test_a_model_that_cannot_read_in_pieces_is_refused() -> None:
    model = build(ModelConfig(vocab=32, width=16, layers=(LinformerConfig(width=16, max_length=16),)))
    with pytest.raises(ValueError, match="linformer of width 16 cannot read a row in pieces"):
        hidden(model, tokens(1, 8), Format("int8"))
