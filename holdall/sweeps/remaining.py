"""How long a sweep still takes: counted operations, calibrated by what its runs have taken so far.

    cost of a run      counted beforehand (holdall/training/flops.py), as if it took all its steps
    seconds a unit     measured: of a run that trains by its own steps, of one that waits by runs of the same
                       model, else by all
    early ends         runs end once they are good enough: what share of its steps one will do is the
                       Kaplan-Meier mean, of runs of the same model if one has ended, else of all. Runs that
                       still train count as not ended so far: those that end first are the short ones, and
                       alone would promise that all are short

What is left is dealt to the workers in order, and the last of them to end is the answer.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class _Run:
    model: str
    operations: float
    """Of all its steps."""
    share: float = 0.0
    """Of its steps that are done."""
    seconds: float | None = None
    """All that it took, once it is finished."""
    began: float | None = None
    began_share: float = 0.0
    seen: float = 0.0
    """When `share` was last reported."""
    finished: bool = False
    left_out: bool = False
    """It is not trained now."""


class Remaining:
    """The seconds that a sweep still takes.

    Args:
        models: of each run, what it shares its speed with: the label of its point.
        operations: of each run, if it takes all its steps.
        workers: runs that train at once.
        clock: seconds, ever growing.
    """

    def __init__(
        self,
        models: Sequence[str],
        operations: Sequence[float],
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runs = [_Run(*each) for each in zip(models, operations, strict=True)]
        self.workers, self.clock = workers, clock

    def progress(self, index: int, share: float) -> None:
        """A run has done this share of its steps."""
        run, now = self.runs[index], self.clock()
        if run.began is None:
            run.began, run.began_share = now, share
        run.share, run.seen = share, now

    def finished(self, index: int, share: float, seconds: float) -> None:
        """A run has ended, after this share of its steps, having taken so long in all."""
        run = self.runs[index]
        run.share, run.seconds, run.finished = share, seconds, True

    def leave_out(self, index: int) -> None:
        """A run is not trained now."""
        self.runs[index].left_out = True

    def seconds(self) -> float | None:
        """Until the last run ends; None while nothing is known."""
        ends: list[float] = []
        waiting: list[float] = []
        for index, run in enumerate(self.runs):
            if run.finished or run.left_out:
                continue
            left = self.seconds_of(index)
            if left is None:
                return None
            (waiting if run.began is None else ends).append(left)
        heapq.heapify(ends)
        while len(ends) < self.workers:
            heapq.heappush(ends, 0.0)
        for each in waiting:
            heapq.heappush(ends, heapq.heappop(ends) + each)
        return max(ends)

    def seconds_of(self, index: int) -> float | None:
        """Until a run ends, once it trains; None while nothing is known."""
        run = self.runs[index]
        speed = _speed(run) or self._mean_speed(run.model) or self._mean_speed(None)
        if speed is None:
            return None
        waited = 0.0 if run.began is None else self.clock() - run.seen
        return max(0.0, run.operations * self._expected(run) * speed - waited)

    def _mean_speed(self, model: str | None) -> float | None:
        """Seconds per operation of a model's runs, None for all of them."""
        found = [_speed(run) for run in self.runs if model in (None, run.model)]
        known = [speed for speed in found if speed is not None]
        return sum(known) / len(known) if known else None

    def _expected(self, run: _Run) -> float:
        """The share of its steps that a run will still do."""
        own = [each for each in self.runs if each.model == run.model]
        evidence = own if any(each.finished for each in own) else self.runs
        alive, at, expected = 1.0, run.share, 0.0
        for end in sorted(each.share for each in evidence if each.finished and run.share < each.share < 1):
            expected += alive * (end - at)
            at = end
            alive *= 1 - 1 / sum(each.share >= end for each in evidence)
        return expected + alive * (1 - at)


def _speed(run: _Run) -> float | None:
    """Seconds per operation of a run, None if it has not shown any."""
    if run.seconds is not None:
        done, took = run.share, run.seconds
    elif run.began is not None:
        done, took = run.share - run.began_share, run.seen - run.began
    else:
        return None
    return took / (done * run.operations) if done > 0 and took > 0 else None


def in_words(seconds: float | None) -> str:
    """As "about 12 min left"; empty if it is not known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds / 5) * 5)} s left" if seconds >= 5 else "a few seconds left"
    minutes = seconds / 60
    return f"about {minutes:.0f} min left" if minutes < 100 else f"about {minutes / 60:.0f} h left"
