"""The quick frontier: a dozen two-layer models on a small MQAR, minutes on two cores.

Small in every way that keeps the published picture: 256 tokens instead of 8,192, width 64, and 4, 8 and
16 pairs in rows of 64, 64 and 96 tokens. Keys never occur in the filler, so that 100% is possible.

What was tried and is worse at the same cost: batches of 64 or 16 rows, a learning rate of 0.02, weight decay
of 0.1, a warm-up, filler of zeros, a vocabulary of 128, 4 pairs in rows of 32 tokens. Models then leave the
plateau late, or by luck. Mamba is the slowest to leave it: with 900 steps it has only begun, so its points
say how fast it learns and not how much it can recall.
"""

from __future__ import annotations

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import MQARData, MQARSegment
from holdall.training.populations import TrainConfig

WIDTH = 64
SEGMENTS = ((64, 4), (64, 8), (96, 16))
RATES = (0.004, 0.008)


def data() -> MQARData:
    """4, 8 and 16 pairs, in rows of 64, 64 and 96 tokens."""
    return MQARData(
        vocab=256,
        filler="key-free",
        train=tuple(MQARSegment(length=length, pairs=pairs, rows=9600) for length, pairs in SEGMENTS),
        test=tuple(MQARSegment(length=length, pairs=pairs, rows=300) for length, pairs in SEGMENTS),
    )


def point(label: str, family: str, mixer: MixerConfig, seeds: int = 1) -> Point:
    """One architecture at the quick setting: a short convolution, then the mixer."""
    train = TrainConfig(
        model=ModelConfig(vocab=256, width=mixer.width, layers=after_conv(mixer)),
        data=data(),
        learning_rates=RATES,
        seeds=tuple(range(seeds)),
        batch=32,
        epochs=1,
        weight_decay=0.01,
        evaluate_every=100,
    )
    return Point(label=label, family=family, train=train)


def sweeps(seeds: int = 1) -> tuple[SweepConfig, ...]:
    """The dozen, the slowest first, so that two cores finish together."""
    mixers: list[tuple[str, str, MixerConfig]] = [
        *((f"Mamba, n = {n}", "Mamba", MambaConfig(width=WIDTH, state=n)) for n in (8, 4)),
        *((f"Taylor, f = {f}", "Taylor", TaylorConfig(width=WIDTH, feature_dim=f)) for f in (16, 8, 4, 2)),
        ("ELU + 1", "ELU + 1", LinearAttentionConfig(width=WIDTH, feature_dim=16)),
        *((f"window {w}", "sliding window", SlidingWindowConfig(width=WIDTH, window=w)) for w in (32, 16, 8)),
        ("BaseConv", "BaseConv", BaseConvConfig(width=WIDTH)),
        ("attention", "attention", AttentionConfig(width=WIDTH)),
    ]
    return (SweepConfig(recipe="quick", points=tuple(point(*each, seeds) for each in mixers)),)
