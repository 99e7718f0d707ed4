"""Training whole populations on a GPU beside the loop that a user would write for one model.

    python -m bench.sweep [FAMILY ...]              all of based-figure2's by default
    python -m bench.sweep --profile [FAMILY ...]    where the time of a population's step goes
    python -m bench.sweep --whole [FAMILY ...]      GPU minutes of the whole recipe, without its tests

The models of the recipe based-figure2 at width 128 (or their largest), vocabulary 8192, batches of 256 rows a
model, at N = 64, K = 4 and N = 256, K = 64. Rows per second of all members together:

    plain          one model, fp32, mixers in plain PyTorch: hidden states and logits of all tokens,
                   cross-entropy that ignores all but the answers, AdamW
    plain, auto    the same loop with the mixers' own kernels, where they have them
    population     as `holdall frontier` trains: four learning rates in one recorded pass, in bf16

`times` compares with `plain`, `times auto` with `plain, auto`.

Letters: B rows, N tokens, K pairs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu, show
from bench.training import plain_loop
from holdall import recipes
from holdall.sweeps import Point
from holdall.tasks.data import MQARSegment
from holdall.training.populations import TrainConfig, Trainer, own_stream, repeatable

SHAPES = ((64, 4), (256, 64))
BATCH, WIDTH, SECONDS = 256, 128, 0.7


def points(families: Sequence[str] = ()) -> list[Point]:
    """One point of each family: the last of those of width 128, or of all."""
    (sweep,) = recipes.sweeps("based-figure2")
    found = []
    for family in families or sweep.families:
        those = [point for point in sweep.points if point.family == family]
        found.append(([p for p in those if p.train.model.width == WIDTH] or those)[-1])
    return found


def config(point: Point, length: int, pairs: int) -> TrainConfig:
    segment = MQARSegment(length=length, pairs=pairs, rows=8 * BATCH)
    data = dataclasses.replace(point.train.data, train=(segment,), test=(segment,))
    return dataclasses.replace(point.train, data=data, epochs=100_000, batch=BATCH)


def population(run: TrainConfig, folder: Path) -> Iterator[None]:
    """The steps of holdall.training.populations, without its tests and checkpoints; yields after each."""
    trainer = Trainer(run, folder, torch.device("cuda"), together=True)
    while True:
        trainer.train_step(trainer.members)
        trainer.step += 1
        yield


def plain(run: TrainConfig, form: str) -> Iterator[None]:
    layers = tuple(dataclasses.replace(layer, form=form) for layer in run.model.layers)
    rows = run.data.task(run.data.train[0]).generate(8 * BATCH)
    model = dataclasses.replace(run.model, layers=layers).build().cuda()
    batches = zip(rows.tokens.cuda().split(BATCH), rows.targets.cuda().split(BATCH), strict=True)
    return plain_loop(model, list(batches))


def rate(steps: Iterator[None], members: int) -> float:
    """Rows per second, after a few steps that warm up."""
    for _ in range(4):
        next(steps)
    torch.cuda.current_stream().synchronize()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        for _ in range(5):  # so that waiting does not count
            next(steps)
        torch.cuda.current_stream().synchronize()
        done += 5
    return members * BATCH * done / (time.perf_counter() - began)


def measure(point: Point, length: int, pairs: int) -> list[dict[str, Any]]:
    """All ways for one model at one shape; a way that fails says why instead."""
    run = config(point, length, pairs)
    found: dict[str, float | str] = {}
    device = torch.device("cuda")
    with TemporaryDirectory() as folder, repeatable(device), own_stream(device):
        found["population"] = _or_reason(lambda: rate(population(run, Path(folder)), len(run.members)))
    for form, way in (("parallel", "plain"), ("auto", "plain, auto")):
        found[way] = _or_reason(lambda form=form: rate(plain(run, form), 1))
    result = {"model": point.label, "width": run.model.width, "length": length, "pairs": pairs}
    for way, base in (("plain", "times"), ("plain, auto", "times auto")):
        ours, theirs = found["population"], found[way]
        both = isinstance(ours, float) and isinstance(theirs, float)
        result[base] = round(ours / theirs, 1) if both else None
    return [{**result, "family": point.family, "rows_per_second": found}]


def _or_reason(measured: Callable[[], float]) -> float | str:
    try:
        return measured()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
    finally:
        torch.cuda.empty_cache()


def run(families: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    for point in points(families):
        for length, pairs in SHAPES:
            yield from measure(point, length, pairs)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The results as people read them."""
    ways = ("plain", "plain, auto", "population")
    shown = Table(title=f"training on a GPU, rows/s; vocabulary 8192, batch {BATCH} a model")
    for column in ("model", "width", "N", "K", *ways, "times", "times auto"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for line in results:
        rates = [line["rows_per_second"][way] for way in ways]
        shown.add_row(
            line["model"],
            *(str(line[key]) for key in ("width", "length", "pairs")),
            *(each if isinstance(each, str) else f"{each:,.0f}" for each in rates),
            *("-" if line[key] is None else f"{line[key]:.1f}" for key in ("times", "times auto")),
        )
    return shown


def profile(point: Point, length: int, pairs: int) -> Table:
    """The kernels of one step of a population, the longest first."""
    device = torch.device("cuda")
    with TemporaryDirectory() as folder, repeatable(device), own_stream(device):
        trained = population(config(point, length, pairs), Path(folder))
        return gpu.profile(f"{point.label}, N = {length}, K = {pairs}", lambda: next(trained))


def whole(families: Sequence[str] = ()) -> Iterator[tuple[Point, dict[int, float], float]]:
    """Each model of the recipe, with the seconds of a step at each length and of all its steps."""
    (sweep,) = recipes.sweeps("based-figure2")
    device = torch.device("cuda")
    for point in sweep.points:
        if point.family not in (families or sweep.families):
            continue
        train = point.train
        steps = collections.Counter[tuple[int, int]]()
        for segment in train.data.train:
            steps[segment.length, segment.pairs] += train.epochs * math.ceil(segment.rows / train.batch)
        seconds: dict[int, float] = {}
        for length, pairs in sorted(steps):  # of one length, the number of pairs matters little
            with TemporaryDirectory() as folder, repeatable(device), own_stream(device):
                run = config(point, length, pairs)
                seconds[length] = (
                    len(run.members) * BATCH / rate(population(run, Path(folder)), len(run.members))
                )
            torch.cuda.empty_cache()
        yield point, seconds, sum(count * seconds[length] for (length, _), count in steps.items())


def print_whole(families: Sequence[str]) -> None:
    minutes = collections.Counter[str]()
    for point, step, all_steps in whole(families):
        times = ", ".join(f"{1e3 * step[length]:.2f}" for length in sorted(step))
        print(
            f"{point.label}, width {point.train.model.width}: {times} ms a step, {all_steps:.0f} s",
            flush=True,
        )
        minutes[point.family] += all_steps / 60
    print({family: round(each, 1) for family, each in minutes.items()}, round(minutes.total(), 1), "minutes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep")
    parser.add_argument("families", nargs="*")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--whole", action="store_true")
    asked = parser.parse_args()
    if asked.whole:
        return print_whole(asked.families)
    if asked.profile:
        for point in points(asked.families):
            for length, pairs in SHAPES:
                Console(width=140).print(profile(point, length, pairs))
    else:
        show("sweep", list(run(asked.families)), table)


if __name__ == "__main__":
    main()
