"""Named language models: the published ones, and small ones of every family with equal parameters.

    based-360m, based-1b                Arora et al., "Simple linear attention language models balance the
    attention-360m, attention-1b        recall-throughput tradeoff", 2024, arXiv 2402.18668, and the configs
    mamba-360m, mamba-1b                of its repository
    jrt-360m, jrt-1b                    Arora et al., "Just read twice: closing the recall gap for recurrent
                                        language models", 2024, arXiv 2407.05483, likewise
    FAMILY-15m, FAMILY-40m              15.4 and 40.7 million parameters without embeddings, within 3.5%
    based-mini                          what `holdall train` trains with no arguments

All have RMSNorm, SwiGLU MLPs without biases and a tied head; Mamba and Mamba-2 have no MLP and twice the
layers. In a family's two sizes the mixers have one head per 64 dimensions and the MLPs take what the mixers
leave of the parameters. Vocabularies are padded as published, to a multiple of 8 or 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from holdall.contract import MixerConfig, did_you_mean
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.gla import GLAConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.long_conv import LongConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.mamba_2 import Mamba2Config
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.retnet import RetNetConfig
from holdall.mixers.rwkv_5 import RWKV5Config
from holdall.mixers.s4 import S4Config
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes import patterns

Layers = tuple[MixerConfig, ...]


# --------------------------------------------------------------------------------------------- published


def _based(
    width: int, depth: int, taylor: tuple[int, ...], *, heads: int = 16, window: int = 129, prefix: int = 0
) -> Layers:
    """Gated short convolutions, but Taylor linear attention at some layers, each with a window behind it.

    With a prefix these read so many tokens bidirectionally: JRT-RNN.
    """
    conv = BaseConvConfig(width=width, expand=4)
    near = SlidingWindowConfig(width=width, heads=heads, window=window, rotary=1.0, bias=False)
    linear: MixerConfig = TaylorConfig(width=width, heads=heads)
    if prefix:
        linear = PrefixLinearAttentionConfig(width=width, heads=heads, prefix=prefix)
    kinds = dict.fromkeys(taylor, linear)
    return tuple(kinds.get(layer, near if layer - 1 in taylor else conv) for layer in range(depth))


def _attention(width: int, heads: int) -> MixerConfig:
    return AttentionConfig(width=width, heads=heads, rotary=0.5, bias=False)


PUBLISHED: dict[str, tuple[Layers, int, int]] = {
    "based-360m": (_based(1024, 27, (1, 6, 11, 16, 21)), 2048, 8),
    "based-1b": (_based(1792, 36, (1, 6, 11, 16, 21, 27, 33)), 3584, 8),
    "jrt-360m": (_based(1024, 26, (1, 6, 11, 16, 21), prefix=1024), 2048, 8),
    "jrt-1b": (_based(1792, 36, (1, 6, 11, 16, 21, 27, 33), prefix=1024), 3584, 8),
    "attention-360m": ((_attention(1024, 16),) * 24, 2816, 16),
    "attention-1b": ((_attention(1680, 24),) * 36, 4608, 16),
    "mamba-360m": ((MambaConfig(width=1024),) * 46, 0, 16),
    "mamba-1b": ((MambaConfig(width=2048),) * 46, 0, 16),
}
"""Layers, inner width of the MLPs, and what the vocabulary is padded to a multiple of.

attention: 8/3 of the width, rounded up to a multiple of 256, as flash-attention's GatedMlp does.
"""


# ------------------------------------------------------------------------------------------------ families


def _rwkv(width: int, depth: int) -> Layers:
    return tuple(RWKV5Config(width=width, layer=layer, layers=depth) for layer in range(depth))


def _base_conv(width: int, depth: int, context_len: int) -> Layers:
    """As in Zoology, a short filter and a long one in turn."""
    long = BaseConvConfig(width=width, filter="long", max_length=context_len)
    return (BaseConvConfig(width=width), long) * (depth // 2)


Family = Callable[[int, int, int], Layers]
"""Width, depth and the longest context to layers; where the depth must be another the family chooses it.

jrt: Based's layers, of which those of linear attention read half of the context bidirectionally.
"""

FAMILIES: dict[str, Family] = {
    "attention": lambda w, depth, n: (_attention(w, w // 64),) * depth,
    "linear-attention": lambda w, depth, n: (
        (LinearAttentionConfig(width=w, heads=w // 64, feature_dim=64),) * depth
    ),
    "based": lambda w, depth, n: _based(w, depth, tuple(range(1, depth, 4)), heads=w // 64),
    "jrt": lambda w, depth, n: _based(
        w, depth, tuple(range(1, depth, 4)), heads=w // 64, prefix=max(1, n // 2)
    ),
    "hyena": lambda w, depth, n: (HyenaConfig(width=w, max_length=n, hidden=64),) * depth,
    "h3": lambda w, depth, n: (H3Config(width=w),) * depth,
    "rwkv": lambda w, depth, n: _rwkv(w, depth),
    "retnet": lambda w, depth, n: (RetNetConfig(width=w, heads=w // 128),) * depth,
    "mamba": lambda w, depth, n: (MambaConfig(width=w),) * (2 * depth),
    "mamba-2": lambda w, depth, n: (Mamba2Config(width=w),) * (2 * depth),
    "gla": lambda w, depth, n: (GLAConfig(width=w, heads=4),) * depth,
    "delta-net": lambda w, depth, n: (DeltaNetConfig(width=w, heads=w // 64),) * depth,
    "gated-delta-net": lambda w, depth, n: (
        (GatedDeltaNetConfig(width=w, heads=w // 64, value_heads=w // 64, value_ratio=1),) * depth
    ),
    "s4": lambda w, depth, n: (S4Config(width=w),) * depth,
    "base-conv": _base_conv,
    "griffin": lambda w, depth, n: patterns.griffin(w, repeats=math.ceil(depth / 3), heads=w // 64),
    # without the squash its filters start as noise that outweighs the text
    "long-conv": lambda w, depth, n: (LongConvConfig(width=w, max_length=n, squash=0.003),) * depth,
    "conv-attention": lambda w, depth, n: patterns.conv_attention(
        w, repeats=depth // 4, convs=3, heads=w // 64
    ),
    "conv-sparse-attention": lambda w, depth, n: patterns.conv_attention(
        w, repeats=depth // 4, convs=3, attend="sparse", heads=w // 64
    ),
}

SIZES: dict[str, tuple[int, int]] = {"15m": (384, 8), "40m": (512, 12)}
"""Width and layers."""
MLPS: dict[str, tuple[int, int]] = {
    "attention": (1168, 1520),
    "linear-attention": (1168, 1520),
    "based": (1072, 1408),
    "jrt": (1040, 1360),
    "hyena": (1120, 1488),
    "h3": (1056, 1408),
    "rwkv": (1024, 1344),
    "retnet": (656, 848),
    "mamba": (0, 0),
    "mamba-2": (0, 0),
    "gla": (1152, 1520),
    "delta-net": (1152, 1520),
    "gated-delta-net": (1024, 1344),
    "s4": (1328, 1776),
    "base-conv": (1536, 2032),
    "griffin": (1104, 1712),
    "long-conv": (992, 1520),
    "conv-attention": (1440, 1904),
    "conv-sparse-attention": (1440, 1904),
}
"""Inner widths of the MLPs at the two sizes, so that all families have the parameters of Mamba."""


def presets() -> list[str]:
    """The names of all language models, the published ones first."""
    return [*PUBLISHED, *(f"{family}-{size}" for family in FAMILIES for size in SIZES), "based-mini"]


def preset(name: str, vocab: int, *, context_len: int = 2048) -> ModelConfig:
    """A named language model for a vocabulary, which is padded.

    Args:
        context_len: the longest context that filters which are as long are made for, of which the prefix of
            jrt-15m and jrt-40m is half.

    Raises KeyError for an unknown name, with the closest known one.
    """
    if name not in presets():
        raise KeyError(f"unknown preset '{name}'. {did_you_mean(name, presets())}")
    if name in PUBLISHED:
        layers, mlp, multiple = PUBLISHED[name]
    elif name == "based-mini":
        layers, mlp, multiple = _based(128, 4, (1,), heads=4, window=33), 256, 8
    else:
        family, _, size = name.rpartition("-")
        layers, multiple = FAMILIES[family](*SIZES[size], context_len), 8
        mlp = MLPS[family][list(SIZES).index(size)]
    return ModelConfig(
        vocab=padded(vocab, layers, multiple),
        width=layers[0].width,
        layers=layers,
        mlp=mlp,
        mlp_kind="swiglu",
        norm="rms",
    )


def padded(vocab: int, layers: Layers, multiple: int = 8) -> int:
    """A vocabulary padded to a multiple; with a prefix by one token at least, which masked ones become."""
    spare = any(getattr(layer, "prefix", 0) for layer in layers)
    return multiple * math.ceil((vocab + spare) / multiple)


def training(name: str) -> dict[str, Any]:
    """How a named model is trained, as fields of PretrainConfig that differ from its defaults.

    The defaults are those of the models published with Based: 20,000 steps of 256 rows of 2,048 tokens.
    """
    if name in ("jrt-360m", "jrt-1b"):
        return {"steps": 60_000, "warmup": 600} if name == "jrt-360m" else {"steps": 100_000, "warmup": 1000}
    if name == "based-mini":
        return {
            "context_len": 256,
            "batch": 16,
            "micro_batch": 16,
            "steps": 500,
            "learning_rate": 4e-3,
            "warmup": 20,
            "evaluate_every": 100,
            "evaluate_rows": 64,
        }
    if name.endswith(tuple(SIZES)):
        return {"batch": 64, "learning_rate": 1e-3}
    return {}
