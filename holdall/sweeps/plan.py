"""What a sweep would train, and how long that takes: nothing is written, at most a few steps are timed."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from holdall.sweeps.config import Job, Point, SweepConfig, in_order
from holdall.sweeps.folder import planned
from holdall.sweeps.pool import at_once
from holdall.sweeps.published import Published
from holdall.sweeps.remaining import Remaining
from holdall.sweeps.result import measure
from holdall.tasks.data import Segment
from holdall.training.populations import finished, train

TIMING_SECONDS = 60.0
"""Once so long was spent on timing steps, the other models are taken to be as fast per operation."""


@dataclass(frozen=True)
class PlannedModel:
    """One point of a sweep: its size, and what is left of it."""

    point: Point
    parameters: int
    state_bytes: int
    """Of one row after the longest test row."""
    finished: int
    """Runs that are finished in the folder."""
    published: int
    """Runs whose published lines are shown instead."""
    left: int
    """Runs to train."""
    seconds: float
    """Expected for the runs that are left, one after another."""


def plan(
    sweep: SweepConfig,
    out: Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    families: Sequence[str] = (),
    published: bool = False,
) -> tuple[list[PlannedModel], float]:
    """The models of a sweep in its folder, and the seconds until all of them are finished.

    The arguments are those of `run_sweep`. The time of a model follows from its finished runs there, which
    include those that ended early; of one without any, from a few steps that are timed now.
    Raises RunError if a run folder holds another run.
    """
    jobs = planned(sweep, out, together=device != "cpu")
    models, operations = [job.model for job in jobs], [job.operations for job in jobs]
    remaining = Remaining(models, operations, at_once(device, workers))
    come_with = Published(sweep) if published else None
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    left = []
    for index in in_order(jobs):
        job = jobs[index]
        if (results := finished(job.point.train, out / "runs" / job.folder)) is not None:
            counts[job.model]["finished"] += 1
            steps, seconds = (max(result[key] for result in results) for key in ("steps", "seconds"))
            remaining.finished(index, min(1.0, steps / job.steps), seconds)
        elif come_with and come_with.of(job) is not None:
            counts[job.model]["published"] += 1
            remaining.leave_out(index)
        elif families and job.point.family not in families:
            remaining.leave_out(index)
        else:
            counts[job.model]["left"] += 1
            left.append(index)
    _time_steps([jobs[index] for index in left], remaining, device)
    seconds_of: dict[str, float] = defaultdict(float)
    for index in left:
        seconds_of[models[index]] += remaining.seconds_of(index) or 0.0
    found = []
    for point in sweep.points:
        name = Job(point, True).model
        state_bytes, _, parameters = measure(point.train.model, sweep.context_len)
        done, shown, to_do = (counts[name][kind] for kind in ("finished", "published", "left"))
        found.append(PlannedModel(point, parameters, state_bytes, done, shown, to_do, seconds_of[name]))
    return found, remaining.seconds() or 0.0


def _time_steps(jobs: Sequence[Job], remaining: Remaining, device: str) -> None:
    """Time a few steps of each model whose speed is not known."""
    until, threads = time.monotonic() + TIMING_SECONDS, torch.get_num_threads()
    known = {run.model for run in remaining.runs if run.finished}
    torch.set_num_threads(1)  # as a sweep's workers
    try:
        for job in jobs:
            if job.model in known or time.monotonic() > until:
                continue
            short = _shortened(job, device)
            with tempfile.TemporaryDirectory(prefix="holdall-") as folder:
                first, *_ = train(short.point.train, Path(folder), device=device, keep_weights=False)
            remaining.timed[job.model] = first["seconds"] / short.operations
            known.add(job.model)
    finally:
        torch.set_num_threads(threads)


def _shortened(job: Job, device: str) -> Job:
    """Two steps at every length, of fewer rows on a CPU, where a row takes the same time in any batch."""
    config = job.point.train
    batch = config.batch if device != "cpu" else min(config.batch, 64)

    def shorter(segments: Sequence[Segment], rows: int) -> tuple[Segment, ...]:
        return tuple(dataclasses.replace(segment, rows=min(segment.rows, rows)) for segment in segments)

    data = config.data
    data = dataclasses.replace(data, train=shorter(data.train, 2 * batch), test=shorter(data.test, batch))
    config = dataclasses.replace(
        config, data=data, batch=batch, epochs=1, evaluate_every=0, warmup=0, stop_at=0.0
    )
    return dataclasses.replace(job, point=dataclasses.replace(job.point, train=config))
