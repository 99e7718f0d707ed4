"""Zoology's figure 2: how wide a model must be to solve MQAR, as the sequence grows.

Arora et al., 2023, arXiv 2312.04927, section 4 and its published configs. Attention solves every length at
width 64; gated convolutions need a width that grows with the length.
Deviations:
- no dropout (published: 0.1 in attention and of embeddings);
- Hyena's filters come out of an MLP of width 16 (published: 64);
- a model without MLP adds nothing after its mixer, where Zoology's identity adds the normalised stream once
  more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.rwkv_4 import RWKV4Config
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import MQARData, MQARSegment
from holdall.training.populations import TrainConfig

VOCAB = 8192
RATES = tuple(float(rate) for rate in np.logspace(-4, -2, 4))
WIDTHS = (64, 128, 256, 512)
BATCH = {64: 512, 128: 512, 256: 256, 512: 128}


def architectures(width: int, length: int) -> dict[str, tuple[MixerConfig, ...]]:
    """The two layers of each architecture, by family."""
    hyena, mamba = HyenaConfig(width=width, max_length=length), MambaConfig(width=width)
    attention, h3 = AttentionConfig(width=width), H3Config(width=width, state=length, head_dim=2)
    return {
        "attention": (attention, attention),
        "Hyena": (hyena, hyena),
        "H3": (h3, h3),
        "RWKV-4": tuple(RWKV4Config(width=width, layer=layer, layers=2) for layer in range(2)),
        "BaseConv": (
            BaseConvConfig(width=width),
            BaseConvConfig(width=width, filter="long", max_length=length),
        ),
        "Based": after_conv(TaylorConfig(width=width, feature_dim=8)),
        "Mamba": (mamba, mamba),
    }


def sweeps(
    seeds: int = 1, *, width: Sequence[int] = WIDTHS, rates: Sequence[float] = RATES
) -> tuple[SweepConfig, ...]:
    """One sweep per length: four widths, all architectures, four learning rates, 64 epochs."""
    found = []
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
        task = MQARData(
            vocab=VOCAB,
            filler="zero",
            train=(MQARSegment(length=length, pairs=pairs, rows=100_000),),
            test=(MQARSegment(length=length, pairs=pairs, rows=3000),),
        )
        points = []
        for size in width:
            for family, layers in architectures(size, length).items():
                positions = length if family == "attention" else 0
                train = TrainConfig(
                    model=ModelConfig(vocab=VOCAB, width=size, layers=layers, positions=positions),
                    data=task,
                    learning_rates=tuple(rates),
                    seeds=tuple(range(seeds)),
                    batch=BATCH[length],
                    epochs=64,
                    schedule="epoch",
                )
                points.append(Point(label=family, family=family, train=train))
        found.append(SweepConfig(recipe="zoology-figure2", part=f"N{length}", points=tuple(points)))
    return tuple(found)
