"""The remaining time of a sweep, against sweeps that are played through with a clock of their own."""

from __future__ import annotations

import dataclasses
import random

import pytest

from holdall.recipes import quick
from holdall.sweeps import Remaining, in_words


@dataclasses.dataclass
class Played:
    """A run as it will turn out: seconds of an operation, and after which share of its steps it ends."""

    model: str
    operations: float
    speed: float
    ends: float

    @property
    def seconds(self) -> float:
        return self.operations * self.speed * self.ends


def played(runs: list[Played], workers: int, tick: float) -> tuple[list[float | None], float]:
    """What was promised at each tick, and when the sweep really ended."""
    now, promised = 0.0, []
    remaining = Remaining(
        [run.model for run in runs], [run.operations for run in runs], workers, clock=lambda: now
    )
    waiting, working = list(range(len(runs))), {}
    while waiting or working:
        while waiting and len(working) < workers:
            working[waiting.pop(0)] = now
        for index, began in list(working.items()):
            run = runs[index]
            share = min((now - began) / (run.operations * run.speed), run.ends)
            if share >= run.ends:
                remaining.finished(index, run.ends, run.seconds)
                del working[index]
            elif share > 0:
                remaining.progress(index, share)
        promised.append(remaining.seconds())
        now += tick
    return promised, now - tick


def test_of_equal_runs_it_is_known_as_soon_as_one_has_moved() -> None:
    promised, end = played([Played("a", 10.0, 1.0, 1.0)] * 6, workers=2, tick=0.5)
    assert promised[:2] == [None, None]
    for tick, each in enumerate(promised[2:], start=2):
        assert each == pytest.approx(end - 0.5 * tick, abs=1.5)  # a worker is handed the next run at a tick


def test_long_runs_among_short_ones_are_counted_by_their_operations() -> None:
    runs = [Played("a", 60.0, 1.0, 1.0), *[Played("b", 5.0, 1.0, 1.0)] * 12]
    promised, end = played(runs, workers=2, tick=0.5)
    assert end == pytest.approx(60, abs=8)
    for tick, each in enumerate(promised[3:], start=3):
        assert each == pytest.approx(end - 0.5 * tick, abs=8)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 6))]
)
def test_it_does_not_mislead_where_models_differ_in_speed_and_some_end_early(seed: int) -> None:
    """One run of each model first: from a quarter of the way on it is right within a fifth."""
    draw = random.Random(seed)
    runs = []
    for model in range(12):
        operations, speed, early = draw.uniform(1, 4), draw.uniform(0.5, 2), model % 2
        runs += [
            Played(str(model), operations, speed, draw.uniform(0.2, 0.7) if early else 1.0) for _ in range(4)
        ]
    rounds = [(index % 4, -run.operations) for index, run in enumerate(runs)]
    runs = [runs[index] for index in sorted(range(len(runs)), key=rounds.__getitem__)]
    promised, end = played(runs, workers=2, tick=0.05)
    for at, factor in ((0.1, 2.5), (0.3, 1.25), (0.5, 1.2), (0.75, 1.2)):
        tick = int(at * len(promised))
        true = end - 0.05 * tick
        assert true / factor < promised[tick] < true * factor, (at, promised[tick], true)


def test_a_run_that_is_resumed_counts_from_where_it_is() -> None:
    now = 0.0
    remaining = Remaining(["a", "a"], [10.0, 10.0], 1, clock=lambda: now)
    remaining.finished(0, 1.0, 20.0)
    assert remaining.seconds() == pytest.approx(20.0)
    remaining.progress(1, 0.9)
    assert remaining.seconds() == pytest.approx(2.0)
    now = 1.5
    assert remaining.seconds() == pytest.approx(0.5)  # between two reports the clock runs on


def test_what_is_not_trained_now_takes_no_time() -> None:
    remaining = Remaining(["a", "b"], [10.0, 10.0], 1)
    remaining.finished(0, 1.0, 20.0)
    remaining.leave_out(1)
    assert remaining.seconds() == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""), (2, "a few seconds left"), (42, "about 40 s left"), (600, "about 10 min left"),
        (3 * 3600, "about 3 h left"),
    ],
)  # fmt: skip
def test_in_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


def test_the_operations_of_a_run_grow_as_its_work_does() -> None:
    (sweep,) = quick.sweeps()
    whole = sweep.jobs(together=False)[0]
    train = dataclasses.replace(whole.point.train, evaluate_every=0)
    job = dataclasses.replace(whole, point=dataclasses.replace(whole.point, train=train))

    def changed(**changes: object) -> float:
        train = dataclasses.replace(job.point.train, **changes)
        return dataclasses.replace(job, point=dataclasses.replace(job.point, train=train)).operations

    assert changed(epochs=2 * train.epochs) == pytest.approx(2 * job.operations)
    assert changed(learning_rates=(1e-3, 1e-2)) == pytest.approx(2 * job.operations)
    longer = dataclasses.replace(
        train.data,
        train=tuple(dataclasses.replace(each, rows=3 * each.rows) for each in train.data.train),
        test=tuple(dataclasses.replace(each, rows=3 * each.rows) for each in train.data.test),
    )
    assert changed(data=longer) == pytest.approx(3 * job.operations)
