"""Architectures that are patterns of layers."""

import pytest
import torch

from holdall.mixers.hawk import HawkConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
from holdall.recipes import patterns
from holdall.recipes.patterns import griffin


def test_griffin_is_two_recurrent_blocks_and_a_window() -> None:
    layers = griffin(16, repeats=2, window=5, lru_width=24)
    assert [type(layer) for layer in layers] == [HawkConfig, HawkConfig, SlidingWindowConfig] * 2
    model = ModelConfig(vocab=10, width=16, layers=layers, mlp=48, norm="rms").build()
    logits, states = model(torch.arange(10)[None])
    assert logits.isfinite().all()
    assert states is not None
    # a recurrence of 24 channels behind 4 taps; 4 past keys and values of 4 dimensions, shared by all heads
    sizes = [sum(tensor.numel() for tensor in state) for state in states]
    assert sizes == [24 * 4 + 1, 24 * 4 + 1, 4 * 4 * 2 + 1] * 2


@pytest.mark.parametrize(
    ("depth", "attentions", "there"),
    [(12, 1, [6]), (24, 2, [8, 16]), (32, 2, [10, 21]), (32, 3, [8, 16, 24]), (4, 0, [])],
)
def test_the_hybrid_of_h3_attends_where_the_released_models_do(depth, attentions, there) -> None:
    names = [config.name for config in patterns.h3_hybrid(16, depth, attentions=attentions, heads=2)]
    assert [layer for layer, name in enumerate(names) if name == "attention"] == there
    assert names.count("h3") == depth - attentions


def test_more_attention_than_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="4 layers of attention"):
        patterns.h3_hybrid(16, 4, attentions=4)


@pytest.mark.parametrize(
    ("attend", "name"),
    [("everywhere", "attention"), ("sparse", "sparse-attention"), ("repeats", "repeat-attention")],
)
def test_a_convolution_attention_hybrid_reads_tokens_in_any_of_its_kinds(attend, name) -> None:
    layers = patterns.conv_attention(16, repeats=2, convs=3, attend=attend, keys=4, heads=2)
    assert [config.name for config in layers] == ["base-conv", "base-conv", "base-conv", name] * 2
    model = ModelConfig(vocab=11, width=16, layers=layers).build()
    tokens_BT = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, _ = model(tokens_BT)
        first, states = model(tokens_BT[:, :13])
        rest, _ = model(tokens_BT[:, 13:], states)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, rtol=0, atol=1e-5)
