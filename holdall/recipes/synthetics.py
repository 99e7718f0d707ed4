"""Induction heads and associative recall, the synthetic tasks on which early state spaces fail.

Fu et al., "Hungry Hungry Hippos", 2022, arXiv 2212.14052, tables 1 and 2: S4D and the gated state space
fail where H3 and attention do not. Two layers of width 32 with MLPs, 5,000 training rows of 31 or 22
tokens, batches of 32, AdamW with weight decay 0.1 and a warm-up over a tenth of the steps, then a cosine.
Each task is trained twice: on every token, as published, most of which are random; and on the answers
alone.
Deviations:
- 100 epochs (50 on the answers alone) instead of 400 for induction heads and 200 for associative recall, and
  the cosine ends at zero;
- the published learning rate, 0.0005, beside one four times as large;
- no dropout (published: 0.1 of embeddings);
- the gated state space has 64 modes instead of 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.gss import GSSConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.s4d import S4DConfig
from holdall.model import ModelConfig
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import Segment, SingleQueryData
from holdall.training.populations import TrainConfig

WIDTH, ROWS, BATCH = 32, 5000, 32
RATES = (0.0005, 0.002)

Task = Literal["induction-heads", "associative-recall"]
Loss = Literal["answers", "every token"]
TASKS: tuple[Task, ...] = ("induction-heads", "associative-recall")
EPOCHS: dict[Loss, int] = {"answers": 50, "every token": 100}


def data(task: Task, loss: Loss) -> SingleQueryData:
    """The rows of one task, as published, and what of them is trained on."""
    vocab, length = (20, 30) if task == "induction-heads" else (10, 20)
    return SingleQueryData(
        task_name=task,
        loss=loss,
        vocab=vocab,
        train=(Segment(length=length, rows=ROWS),),
        test=(Segment(length=length, rows=500),),
    )


def sweeps(seeds: int = 1, *, rates: Sequence[float] = RATES) -> tuple[SweepConfig, ...]:
    """One sweep per task and loss: two equal layers of each mixer. The shorter loss comes first."""
    mixers: dict[str, MixerConfig] = {
        "gated state space": GSSConfig(width=WIDTH, modes=64),
        "H3": H3Config(width=WIDTH),
        "S4D": S4DConfig(width=WIDTH),
        "attention": AttentionConfig(width=WIDTH),
    }
    found = []
    for loss, epochs in EPOCHS.items():
        for task in TASKS:
            rows = data(task, loss)
            points = []
            for family, mixer in mixers.items():
                model = ModelConfig(
                    vocab=rows.vocab,
                    width=WIDTH,
                    layers=(mixer, mixer),
                    mlp=4 * WIDTH,
                    positions=rows.longest if family == "attention" else 0,
                )
                train = TrainConfig(
                    model=model,
                    data=rows,
                    learning_rates=tuple(rates),
                    seeds=tuple(range(seeds)),
                    batch=BATCH,
                    epochs=epochs,
                    warmup=-(-ROWS // BATCH) * epochs // 10,
                    stop_at=1.0,
                )
                points.append(Point(label=family, family=family, train=train))
            part = task if loss == "every token" else f"{task}-answers"
            found.append(SweepConfig(recipe="synthetics", part=part, points=tuple(points)))
    return tuple(found)
