"""A recipe of your own: the mixer and the task of the files beside this one, among mixers of Holdall.

    holdall frontier examples/own_recipe.py --dry-run    models, bytes of state, and how long it would take
    holdall frontier examples/own_recipe.py              trains them in runs/own-recipe, draws the picture
    holdall frontier examples/own_recipe.py --add gla --width 16 32
    python examples/own_recipe.py                        the same from Python, less of it and in seconds

A recipe is a function `sweeps` whose arguments are the flags of `holdall frontier`. It may import the files
beside it. Run as a script, it trains four of the models for a few steps and prints where each lands.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from own_mixer import FadingConfig
from own_task import data

from holdall import report
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps import Point, SweepConfig, run_sweep
from holdall.training.populations import TrainConfig

BATCH = 32


def sweeps(
    seeds: int = 1,
    *,
    length: Sequence[int] = (8, 16, 32),
    width: Sequence[int] = (32,),
    steps: int = 400,
    rates: Sequence[float] = (0.005, 0.02),
) -> SweepConfig:
    """The same rows for all models, so that one picture can compare them; `length`: moves per row."""
    rows = data(steps, BATCH, mentions=tuple(length))
    points = []
    for size in width:
        for label, family, mixer in (
            ("attention", "attention", AttentionConfig(width=size)),
            ("window 16", "sliding window", SlidingWindowConfig(width=size, window=16)),
            ("sum", "linear attention", LinearAttentionConfig(width=size)),
            ("fading sum, 4 heads", "fading sum", FadingConfig(width=size)),
            ("fading sum, 1 head", "fading sum", FadingConfig(width=size, heads=1)),
            ("DeltaNet", "DeltaNet", DeltaNetConfig(width=size)),
        ):
            train = TrainConfig(
                model=ModelConfig(vocab=rows.vocab, width=size, layers=after_conv(mixer)),
                data=rows,
                learning_rates=tuple(rates),  # each is trained; the best counts
                seeds=tuple(range(seeds)),
                batch=BATCH,
                weight_decay=0.01,
                evaluate_every=100,
            )
            points.append(Point(label=label, family=family, train=train))
    return SweepConfig(recipe="own-recipe", points=tuple(points))


def main() -> None:
    sweep = sweeps(length=(8, 16), steps=150, rates=(0.01,))
    families = ["linear attention", "fading sum", "DeltaNet"]
    with tempfile.TemporaryDirectory() as folder:
        lines = run_sweep(sweep, Path(folder), plugins=[Path(__file__)], families=families)
        written = report.write([Path(folder)], Path(folder))
        for line in sorted(lines, key=lambda line: -line["accuracy"]):
            print(
                f"{line['label']:20} {line['state_bytes']:6,} bytes of state, {line['accuracy']:4.0%} right"
            )
        print("a report of it has", *(path.name for path in written))


if __name__ == "__main__":  # its runs train in processes of their own, which read this file again
    main()
