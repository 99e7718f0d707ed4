"""Published architectures that are patterns of layers, as lists of mixer configs from bottom to top."""

from __future__ import annotations

from holdall.contract import MixerConfig
from holdall.mixers.base_conv import BaseConvConfig
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
