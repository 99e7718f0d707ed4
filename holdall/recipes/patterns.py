"""Published architectures that are patterns of layers, as lists of mixer configs from bottom to top."""

from __future__ import annotations

from typing import Literal

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.hawk import HawkConfig
from holdall.mixers.repeat_attention import RepeatAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.sparse_attention import SparseAttentionConfig
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


def h3_hybrid(
    width: int, depth: int, *, attentions: int = 2, heads: int = 1, state: int = 64
) -> tuple[MixerConfig, ...]:
    """H3's hybrid: H3 in all of `depth` layers but a few of attention, evenly between them.

    Fu et al., 2022, arXiv 2212.14052, and the released models: attention is layer 6 of 12 (from 0), layers 8
    and 16 of 24, 10 and 21 of 32. Raises ValueError if so many do not fit.
    """
    if not 0 <= attentions < depth:
        raise ValueError(f"{attentions} layers of attention do not fit between others in depth {depth}")
    h3 = H3Config(width=width, state=state)
    attention = AttentionConfig(width=width, heads=heads)
    there = {(place + 1) * depth // (attentions + 1) for place in range(attentions)}
    return tuple(attention if layer in there else h3 for layer in range(depth))


def conv_attention(
    width: int,
    *,
    repeats: int = 1,
    convs: int = 1,
    attend: Literal["everywhere", "sparse", "repeats"] = "everywhere",
    keys: int = 64,
    heads: int = 1,
) -> tuple[MixerConfig, ...]:
    """Short gated convolutions with a little attention between them: the hybrids of Zoology.

    Arora et al., 2023, arXiv 2312.04927, section 5: a convolution is enough for all that is not recall, and
    attention may be confined to where it is needed. `repeats` stacks `convs` convolutions and one layer that
    attends everywhere, to the `keys` tokens that a learned score keeps, or only where a token comes again.
    """
    attention: dict[str, MixerConfig] = {
        "everywhere": AttentionConfig(width=width, heads=heads),
        "sparse": SparseAttentionConfig(width=width, heads=heads, keys=keys),
        "repeats": RepeatAttentionConfig(width=width, heads=heads),
    }
    return (*(BaseConvConfig(width=width),) * convs, attention[attend]) * repeats
