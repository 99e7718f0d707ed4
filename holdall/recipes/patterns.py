"""Published architectures that are patterns of layers, as lists of mixer configs from bottom to top."""

from __future__ import annotations

from holdall.contract import MixerConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.hawk import HawkConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig


def after_conv(mixer: MixerConfig) -> tuple[MixerConfig, ...]:
    """A short gated convolution, then the mixer: the two layers in which Zoology and Based compare mixers.

    The convolution puts a key and its value into one place; what the mixer adds is remembering them.
    """
    return (BaseConvConfig(width=mixer.width), mixer)


def based(
    width: int, *, repeats: int = 1, feature_dim: int = 16, window: int = 16, heads: int = 1
) -> tuple[MixerConfig, ...]:
    """Based: short gated convolutions, Taylor linear attention for what is far, a window for what is near.

    Arora et al., 2024, arXiv 2402.18668. `repeats` stacks the three layers.
    """
    return (
        BaseConvConfig(width=width),
        TaylorConfig(width=width, feature_dim=feature_dim, heads=heads),
        SlidingWindowConfig(width=width, window=window, heads=heads, rotary=1.0, bias=False),
    ) * repeats


def griffin(
    width: int, *, repeats: int = 1, window: int = 1025, heads: int = 4, lru_width: int = 0
) -> tuple[MixerConfig, ...]:
    """Griffin: two recurrent blocks, then attention within a window, whose heads share their keys and values.

    De et al., 2024, arXiv 2402.19427. `repeats` stacks the three layers. `heads` are those of the queries and
    the blocks of the recurrence's gates; the paper's window of 1024 past tokens is 1025 with the present one.
    """
    recurrent = HawkConfig(width=width, lru_width=lru_width, heads=heads)
    local = SlidingWindowConfig(width=width, window=window, heads=heads, kv_heads=1, rotary=0.5, bias="out")
    return (recurrent, recurrent, local) * repeats
