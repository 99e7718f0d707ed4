"""Based's figure 2: recall against bytes of state, on one mixture of MQAR.

Arora et al., 2024, arXiv 2402.18668, and its published configs: attention, sliding windows and Taylor linear
attention after a short convolution, and so GLA, DeltaNet, Gated DeltaNet and RWKV-7, which Zoology added
later; Mamba, Mamba-2, Hyena and H3 in both layers.
A published window of b sees b tokens and itself, which is `window` b + 1 here.
Deviations:
- as in zoology_figure2, and passes in bf16 (holdall/precision.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.gla import GLAConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.mamba_2 import Mamba2Config
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import MQARData, MQARSegment
from holdall.training.populations import TrainConfig

VOCAB = 8192
RATES = tuple(float(rate) for rate in np.logspace(-3, -1.5, 4))
LONGEST = 1024

TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


def data() -> MQARData:
    """Trained up to 64 pairs, tested up to 256."""
    return MQARData(
        vocab=VOCAB,
        filler="random",
        train=tuple(MQARSegment(length=length, pairs=pairs, rows=rows) for length, pairs, rows in TRAIN),
        test=tuple(MQARSegment(length=length, pairs=pairs, rows=1000) for length, pairs in TEST),
    )


def architectures() -> list[tuple[str, str, tuple[MixerConfig, ...]]]:
    """(label, family, layers) of every model."""
    found: list[tuple[str, str, tuple[MixerConfig, ...]]] = []
    for width in (64, 128):
        found.append(("attention", "attention", after_conv(AttentionConfig(width=width))))
    for width in (48, 64, 128):
        for f in (8, 16, 24):
            taylor = TaylorConfig(width=width, feature_dim=f)
            found.append((f"Taylor, f = {f}", "Taylor", after_conv(taylor)))
    for past in (8, 16, 32, 64, 128, 256, 512, 1024):
        window = SlidingWindowConfig(width=128, window=past + 1)
        found.append((f"window {past + 1}", "sliding window", after_conv(window)))
    for width in (64, 128, 256):
        for n in (8, 16, 24):
            mamba = MambaConfig(width=width, state=n)
            found.append((f"Mamba, n = {n}", "Mamba", (mamba, mamba)))
            mamba_2 = Mamba2Config(width=width, state=n)
            found.append((f"Mamba-2, n = {n}", "Mamba-2", (mamba_2, mamba_2)))
    for width in (64, 128, 256):
        hyena = HyenaConfig(width=width, max_length=LONGEST)
        h3 = H3Config(width=width, state=width // 4, head_dim=2)
        found.append(("Hyena", "Hyena", (hyena, hyena)))
        found.append(("H3", "H3", (h3, h3)))
        found.append(("GLA", "GLA", after_conv(GLAConfig(width=width, heads=2))))
        found.append(("DeltaNet", "DeltaNet", after_conv(DeltaNetConfig(width=width))))
        gated = GatedDeltaNetConfig(width=width, gate=False)
        found.append(("Gated DeltaNet", "Gated DeltaNet", after_conv(gated)))
        rwkv = RWKV7Config(width=width, heads=width // 64, decay_rank=16, layer=1, layers=2)
        found.append(("RWKV-7", "RWKV-7", after_conv(rwkv)))
    return found


def sweeps(seeds: int = 1, *, rates: Sequence[float] = RATES) -> tuple[SweepConfig, ...]:
    """Every model at four learning rates, 32 epochs of 180,000 rows."""
    task = data()
    points = []
    for label, family, layers in architectures():
        width = layers[0].width
        train = TrainConfig(
            model=ModelConfig(vocab=VOCAB, width=width, layers=layers),
            data=task,
            learning_rates=tuple(rates),
            seeds=tuple(range(seeds)),
            batch=256,
            epochs=32,
            schedule="epoch",
            precision="bf16",
        )
        points.append(Point(label=label, family=family, train=train))
    return (SweepConfig(recipe="based-figure2", points=tuple(points)),)
