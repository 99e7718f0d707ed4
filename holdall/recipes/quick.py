"""The quick frontier: a dozen two-layer models on a small MQAR, minutes on two cores.

Small in every way that keeps the published picture: 256 tokens instead of 8,192, width 64, and 4, 8 and
16 pairs in rows of 64, 64 and 96 tokens. Keys never occur in the filler, so that 100% is possible. All models
have the same steps and the same learning rates.

Mamba is left out: at this size it says nothing about its state. With 4 to 16 states per channel it recalls
at most 12% after 900 steps and, with 4 or 16, at most 15% after 4,000, whatever the learning rate from 0.001
to 0.016; 14.6% is a guess among the values of the row. It has learned which values there are, and not whose.
With the training of `based-figure2` it recalls 55 to 86%. `holdall frontier quick --add mamba` shows it among
the others.

What was tried and is worse at the same cost: batches of 64 or 16 rows, a learning rate of 0.002 (most models
stay on the plateau) or 0.016 (windows stay there, and attention and Gated DeltaNet mostly), weight decay of
0.1, a warm-up, filler of zeros, a vocabulary of 128, 4 pairs in rows of 32 tokens. Models then leave the
plateau late, or by luck. More steps still help small states: after 1,500, Taylor at f = 4 recalls 81 to 84%
and ELU + 1 69 to 77%. results/quick/README.md has the commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.mamba_2 import Mamba2Config
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import DataConfig, MQARData, MQARSegment, Segment, SingleQueryData
from holdall.training.populations import TrainConfig

WIDTH, PAIRS, VOCAB, DEPTH, STEPS, BATCH = 64, (4, 8, 16), 256, 2, 900, 32
RATES = (0.004, 0.008)

Task = Literal["mqar", "induction-heads", "associative-recall"]


def data(
    task: Task = "mqar",
    pairs: Sequence[int] = (),
    length: Sequence[int] = (),
    vocab: int = VOCAB,
    steps: int = STEPS,
    passes: int = 1,
) -> DataConfig:
    """Rows for so many steps: of MQAR with 4, 8 and 16 pairs, in 64, 64 and 96 tokens.

    length: one for all pairs or one for each, by default six tokens a pair and at least 64; of the other
    tasks, which have no pairs, one for each part of the rows. passes: how often MQAR's pairs are read before
    the questions; each pass more makes rows longer by two tokens a pair.
    Raises ValueError for numbers that do not fit together.
    """
    if task == "mqar":
        pairs = pairs or PAIRS
        length = length or tuple(max(64, 6 * count) for count in pairs)
        length = tuple(length) * len(pairs) if len(length) == 1 else length
        if len(length) != len(pairs):
            raise ValueError(f"{len(pairs)} numbers of pairs need one length, or as many, not {len(length)}")
        rows = _rows(steps, len(pairs))
        sizes = list(zip(length, pairs, strict=True))
        return MQARData(
            vocab=vocab,
            filler="key-free",
            passes=passes,
            train=tuple(
                MQARSegment(length=n, pairs=k, rows=r) for (n, k), r in zip(sizes, rows, strict=True)
            ),
            test=tuple(MQARSegment(length=n, pairs=k, rows=300) for n, k in sizes),
        )
    if pairs:
        raise ValueError(f"{task} has no pairs; its rows differ in length")
    if passes != 1:
        raise ValueError(f"{task} has no pairs to read in {passes} passes; mqar has")
    length = length or (64,)
    return SingleQueryData(
        task_name=task,
        loss="answers",
        vocab=vocab,
        train=tuple(
            Segment(length=n, rows=r) for n, r in zip(length, _rows(steps, len(length)), strict=True)
        ),
        test=tuple(Segment(length=n, rows=300) for n in length),
    )


def _rows(steps: int, parts: int) -> list[int]:
    """Training rows of each part of a task, so that one epoch has this many steps."""
    if steps < parts:
        raise ValueError(f"{steps} steps are fewer than one for each of {parts} lengths")
    return [BATCH * (steps // parts + (part < steps % parts)) for part in range(parts)]


def point(
    label: str,
    family: str,
    mixer: MixerConfig,
    seeds: int = 1,
    *,
    task: DataConfig | None = None,
    depth: int = DEPTH,
    rates: Sequence[float] = (),
) -> Point:
    """One architecture at the quick setting: a short convolution, then the mixer, until it is deep enough."""
    task = task or data()
    if depth % 2:
        raise ValueError(f"depth {depth} is odd; a convolution and a mixer take turns")
    train = TrainConfig(
        model=ModelConfig(vocab=task.vocab, width=mixer.width, layers=after_conv(mixer) * (depth // 2)),
        data=task,
        learning_rates=tuple(rates) or RATES,
        seeds=tuple(range(seeds)),
        batch=BATCH,
        epochs=1,
        weight_decay=0.01,
        evaluate_every=100,
    )
    return Point(label=label, family=family, train=train)


def architectures(width: int) -> list[tuple[str, str, MixerConfig]]:
    """(label, family, mixer) of the dozen: attention, what forgets by place, sums, delta rules, decays."""
    return [
        ("attention", "attention", AttentionConfig(width=width)),
        *((f"window {w}", "sliding window", SlidingWindowConfig(width=width, window=w)) for w in (16, 32)),
        ("BaseConv", "BaseConv", BaseConvConfig(width=width)),
        ("ELU + 1", "ELU + 1", LinearAttentionConfig(width=width, feature_dim=16)),
        *((f"Taylor, f = {f}", "Taylor", TaylorConfig(width=width, feature_dim=f)) for f in (4, 8, 16)),
        ("DeltaNet", "DeltaNet", DeltaNetConfig(width=width)),
        ("Gated DeltaNet", "Gated DeltaNet", GatedDeltaNetConfig(width=width)),
        *((f"Mamba-2, n = {n}", "Mamba-2", Mamba2Config(width=width, state=n)) for n in (32, 128)),
    ]


def sweeps(
    seeds: int = 1,
    *,
    task: Task = "mqar",
    pairs: Sequence[int] = (),
    length: Sequence[int] = (),
    passes: int = 1,
    vocab: int = VOCAB,
    width: Sequence[int] = (WIDTH,),
    depth: int = DEPTH,
    steps: int = STEPS,
    rates: Sequence[float] = (),
) -> tuple[SweepConfig, ...]:
    """The dozen at each width."""
    rows = data(task, pairs, length, vocab, steps, passes)
    points = [
        point(*each, seeds, task=rows, depth=depth, rates=rates)
        for size in width
        for each in architectures(size)
    ]
    return (SweepConfig(recipe="quick", points=tuple(points)),)
