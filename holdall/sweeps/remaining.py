"""How long a sweep will still take: counted operations, calibrated by the time of its runs so far.

    operations       counted beforehand (holdall/training/flops.py), as if a run took all its steps
    seconds of one   measured: on a run's own steps while it trains, before that on runs of the same model
                     or a few steps of it, else on all runs
    early ends       runs end once they are accurate enough: the share of its steps that a run will do is the
                     Kaplan-Meier mean over runs of the same model if one has ended, else over all. Runs that
                     still train count as not ended so far: the first to end are the short ones, and alone
                     would promise that all are short

The runs that are left are dealt to the workers in order; the time until the last of them ends is the answer.
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
    """FLOPs of all its steps."""
    share: float = 0.0
    """The share of its steps that is done."""
    seconds: float | None = None
    """The time of its training, once it is finished."""
    began: float | None = None
    """When its first progress was reported; None while it waits."""
    began_share: float = 0.0
    """The share of its steps that was done by then."""
    seen: float = 0.0
    """When `share` was last reported."""
    finished: bool = False
    left_out: bool = False
    """It is not trained now."""


class Remaining:
    """The seconds that a sweep will still take.

    Args:
        models: the model of each run; runs of the same model take the same time per operation.
        operations: FLOPs of each run, if it takes all its steps.
        workers: runs that train at once.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        models: Sequence[str],
        operations: Sequence[float],
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runs = [_Run(*run) for run in zip(models, operations, strict=True)]
        self.workers, self.clock = workers, clock
        self.timed: dict[str, float] = {}
        """Seconds per operation of models of which a few steps were timed."""

    def progress(self, index: int, share: float) -> None:
        """A run has done this share of its steps."""
        run, now = self.runs[index], self.clock()
        if run.began is None:
            run.began, run.began_share = now, share
        run.share, run.seen = share, now

    def finished(self, index: int, share: float, seconds: float) -> None:
        """A run has ended after this share of its steps and this many seconds of training."""
        run = self.runs[index]
        run.share, run.seconds, run.finished = share, seconds, True

    def leave_out(self, index: int) -> None:
        """A run is not trained now."""
        self.runs[index].left_out = True

    def seconds(self) -> float | None:
        """Seconds until the last run ends; None before the first measurement."""
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
        for duration in waiting:
            heapq.heappush(ends, heapq.heappop(ends) + duration)
        return max(ends)

    def seconds_of(self, index: int) -> float | None:
        """Seconds until a run ends, from when it trains; None before the first measurement."""
        run = self.runs[index]
        speed = _speed(run) or self._mean_speed(run.model) or self._mean_speed(None)
        if speed is None:
            return None
        waited = 0.0 if run.began is None else self.clock() - run.seen
        return max(0.0, run.operations * self._expected(run) * speed - waited)

    def _mean_speed(self, model: str | None) -> float | None:
        """Seconds per operation of a model's runs, None for all of them."""
        speeds = [_speed(run) for run in self.runs if model in (None, run.model)]
        known = [speed for speed in speeds if speed is not None]
        known = known or [speed for timed, speed in self.timed.items() if model in (None, timed)]
        return sum(known) / len(known) if known else None

    def _expected(self, run: _Run) -> float:
        """The share of its steps that a run will still do."""
        same = [other for other in self.runs if other.model == run.model]
        evidence = same if any(other.finished for other in same) else self.runs
        alive, at, expected = 1.0, run.share, 0.0
        for end in sorted(o.share for o in evidence if o.finished and run.share < o.share < 1):
            expected += alive * (end - at)
            at = end
            alive *= 1 - 1 / sum(other.share >= end for other in evidence)
        return expected + alive * (1 - at)


def _speed(run: _Run) -> float | None:
    """Seconds per operation of a run; None before it was measured."""
    if run.seconds is not None:
        share, seconds = run.share, run.seconds
    elif run.began is not None:
        share, seconds = run.share - run.began_share, run.seen - run.began
    else:
        return None
    return seconds / (share * run.operations) if share > 0 and seconds > 0 else None


def in_words(seconds: float | None) -> str:
    """A text like "about 12 min left"; empty if it is not known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds / 5) * 5)} s left" if seconds >= 5 else "a few seconds left"
    minutes = seconds / 60
    return f"about {minutes:.0f} min left" if minutes < 100 else f"about {minutes / 60:.0f} h left"
