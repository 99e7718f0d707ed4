"""A training step of every mixer beside attention's, as `holdall zoo` trains them on a CPU.

    python -m bench.zoo [MIXER...]

The recipe's models and rows: two layers of width 64, a short convolution and then the mixer, and 32 rows of
64 or 96 tokens. One thread, and seconds of this process alone, since others may share the cores. Each step is
followed by attention's on the same rows: `times attention` is the median ratio of the two, over all steps
after those that warm up.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

from bench import show
from holdall.recipes import zoo
from holdall.sweeps import Point
from holdall.sweeps.worker import keep_freed_memory
from holdall.training.populations import Trainer

WARM_UP, STEPS = 3, 21
BESIDE = "attention"


def seconds_of_step(trainer: Trainer) -> float:
    """CPU seconds of the first member's next step."""
    before = time.process_time()
    trainer.train_step(trainer.members[:1])
    trainer.step += 1
    return time.process_time() - before


def measure(point: Point, beside: Point) -> dict[str, Any]:
    """Both points' steps in turn."""
    with TemporaryDirectory() as folder:
        ours, theirs = (
            Trainer(each.train, Path(folder) / name, torch.device("cpu"), together=False)
            for each, name in ((point, "ours"), (beside, "beside"))
        )
        steps = [(seconds_of_step(ours), seconds_of_step(theirs)) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    ratios = statistics.quantiles([one / other for one, other in steps], n=10)
    return {
        "mixer": point.label,
        "step_ms": round(1e3 * statistics.median(one for one, _ in steps), 1),
        "attention_ms": round(1e3 * statistics.median(other for _, other in steps), 1),
        "times_attention": round(ratios[4], 2),
        "fast_decile": round(ratios[0], 2),
        "slow_decile": round(ratios[8], 2),
    }


def run(*names: str) -> Iterator[dict[str, Any]]:
    """Every mixer of the registry, or those that are named."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        points = {point.label: point for sweep in zoo.sweeps() for point in sweep.points}
        for name in names or points:
            yield measure(points[name], points[BESIDE])
    finally:
        torch.set_num_threads(threads)


def table(results: list[dict[str, Any]]) -> Table:
    """The results, the slowest first."""
    shown = Table(title="a training step of the zoo's recipe, CPU time of one thread")
    for column in ("mixer", "ms", "attention, ms", "times attention", "fast..slow decile"):
        shown.add_column(column, justify="left" if column == "mixer" else "right")
    for r in sorted(results, key=lambda r: -r["times_attention"]):
        shown.add_row(
            r["mixer"],
            f"{r['step_ms']:.1f}",
            f"{r['attention_ms']:.1f}",
            f"{r['times_attention']:.1f}",
            f"{r['fast_decile']:.1f}..{r['slow_decile']:.1f}",
        )
    return shown


def main() -> None:
    show("zoo", list(run(*sys.argv[1:])), table)


if __name__ == "__main__":
    main()
