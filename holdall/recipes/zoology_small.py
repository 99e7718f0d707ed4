"""A small version of Zoology's figure 2, within an hour: the width that gated convolutions need, by length.

The published experiment (zoology_figure2.py) trains 64 epochs of 100,000 rows; this one keeps its law and
not its scale: rows of 16 and 32 tokens with 2 and 4 pairs, 64 tokens of vocabulary, filler of zeros, widths
of 16 to 128, at most 4,000 steps of 2,048 tokens. Every model has two layers, a short convolution and then
the mixer, since attention alone needs far longer to find the same.

What was tried and shows less: 256 tokens of vocabulary and filler without keys, where gated convolutions
stay at the share of a guess among their row's values at every width; a learning rate of 0.02, no better for
them; rows of 64 tokens with 8 pairs, which no gated convolution of up to 128 solves in so few steps, and
for which attention needs batches twice as large.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import MQARData, MQARSegment
from holdall.training.populations import TrainConfig

VOCAB, STEPS, TOKENS = 64, 4000, 2048
WIDTHS = (128, 64, 32, 16)
LENGTHS = ((16, 2), (32, 4))
RATES = (0.001, 0.01)


def mixers(width: int, length: int) -> dict[str, MixerConfig]:
    """The mixer of the second layer, by family; gated convolutions first, since they take longest."""
    return {
        "Hyena": HyenaConfig(width=width, max_length=length),
        "H3": H3Config(width=width, state=length),
        "BaseConv": BaseConvConfig(width=width, filter="long", max_length=length),
        "Based": TaylorConfig(width=width, feature_dim=8),
        "attention": AttentionConfig(width=width),
    }


def sweeps(
    seeds: int = 1,
    *,
    vocab: int = VOCAB,
    width: Sequence[int] = WIDTHS,
    steps: int = STEPS,
    rates: Sequence[float] = RATES,
) -> tuple[SweepConfig, ...]:
    """One sweep per length, the longest rows last."""
    found = []
    for length, pairs in LENGTHS:
        batch = TOKENS // length
        task = MQARData(
            vocab=vocab,
            filler="zero",
            train=(MQARSegment(length=length, pairs=pairs, rows=steps * batch),),
            test=(MQARSegment(length=length, pairs=pairs, rows=500),),
        )
        points = []
        for size in width:
            for family, mixer in mixers(size, length).items():
                train = TrainConfig(
                    model=ModelConfig(vocab=vocab, width=size, layers=after_conv(mixer)),
                    data=task,
                    learning_rates=tuple(rates),
                    seeds=tuple(range(seeds)),
                    batch=batch,
                    weight_decay=0.01,
                    evaluate_every=250,
                )
                points.append(Point(label=family, family=family, train=train))
        found.append(SweepConfig(recipe="zoology-small", part=f"N{length}", points=tuple(points)))
    return tuple(found)
