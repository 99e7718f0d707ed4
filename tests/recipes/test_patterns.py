"""Architectures that are patterns of layers."""

import torch

from holdall.mixers.hawk import HawkConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
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
