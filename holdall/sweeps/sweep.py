"""Run a sweep: train what is missing in its folder, and write down each result as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from holdall import settings
from holdall.contract import did_you_mean
from holdall.settings import NonNegativeFloat
from holdall.sweeps.cluster import RayPool
from holdall.sweeps.compile_ahead import compiling_ahead
from holdall.sweeps.config import SweepConfig, in_order
from holdall.sweeps.folder import OutOfTime, claimed, other_lines, planned
from holdall.sweeps.pool import LOOK_SECONDS, Pool, at_once, devices
from holdall.sweeps.published import Published
from holdall.training.populations import Progress


@dataclass(frozen=True)
class Watcher:
    """Callbacks of a sweep, such as progress bars; each gets a run's index in `planned` first."""

    progress: Callable[[int, Progress], None] = lambda index, progress: None
    """Called a few times a second with the progress of each run that trains, from another thread."""
    finished: Callable[[int, list[dict[str, Any]]], None] = lambda index, lines: None
    """Called with the lines of results.jsonl of each run, those of earlier calls and published ones first."""
    others: Callable[[list[dict[str, Any]]], None] = lambda lines: None
    """Called once with the lines of models that earlier calls added to the folder."""


def run_sweep(
    sweep: SweepConfig,
    out: Path,
    *,
    command: str = "",
    device: str = "cpu",
    workers: int | None = None,
    plugins: Sequence[Path] = (),
    families: Sequence[str] = (),
    minutes: float | None = None,
    together: bool | None = None,
    on: Literal["here", "ray"] = "here",
    keep_weights: bool = True,
    published: bool = False,
    laws: Mapping[str, Mapping[str, Any]] | None = None,
    watcher: Watcher | None = None,
) -> list[dict[str, Any]]:
    """Run a sweep, or resume it, and return its lines of results.jsonl.

    The folder may hold more models, which earlier calls added: they stay there.
    Any number of processes, on any machines that see the folder, can do that at once: each run is trained by
    the one that claims it first, and each process returns when all runs are finished. A run whose process was
    killed is resumed by another.

    Args:
        out: the sweep's folder.
        command: what the user typed, kept in config.json.
        device: "cpu" or "cuda", which is all GPUs of the machine.
        workers: runs that train at once, each in a process; by default one per core, or per GPU.
        plugins: the user's own files of mixers, tasks and recipes.
        families: train only these now; finished runs of the others count all the same.
        minutes: stop within this time and keep what is finished by then; None for no limit.
        together: whether a population is one run; by default on a GPU.
        on: "here", or "ray" for a Ray cluster, or one that is started here (holdall/sweeps/cluster.py). Its
            machines see the folder under the same path; with GPUs, this one has one too.
        keep_weights: whether runs keep their trained weights.
        published: do not train models of which runs were published: those are shown, where this folder has
            none.
        laws: by label, which laws a model's mixer breaks or refuses, as kept in its lines.

    Raises:
        ValueError: the sweep has no such family.
        RunError: the folder cannot be written, or holds another sweep; or a worker died.
        OutOfTime: something is still to be trained.
        KeyboardInterrupt: after every run has written its checkpoint.
    """
    for family in families:
        if family not in sweep.families:
            raise ValueError(f"unknown family '{family}'. {did_you_mean(family, sweep.families)}")
    if minutes is not None:
        settings.check("minutes", minutes, NonNegativeFloat)
    together = device != "cpu" if together is None else together
    watcher, ours = watcher or Watcher(), set[int]()
    jobs = planned(sweep, out, together=together)
    chosen = [i for i, job in enumerate(jobs) if not families or job.point.family in families]
    wanted = [chosen[place] for place in in_order([jobs[i] for i in chosen])]

    def progress(index: int, now: Progress) -> None:
        ours.add(index)
        watcher.progress(index, now)

    come_with = Published(sweep) if published else None
    with claimed(out, sweep, jobs, command, device, come_with=come_with, laws=laws) as runs:
        watcher.others(other_lines(out, sweep))

        def look() -> None:
            for index, lines in runs.gather().items():
                watcher.finished(index, lines)
            for index, now in runs.moved():
                if index not in ours:
                    watcher.progress(index, now)

        def left() -> list[int]:
            return [index for index in wanted if index not in runs.lines]

        look()
        if left() and minutes != 0:
            own_files, stopped = [str(path) for path in plugins], False
            with contextlib.ExitStack() as stack:
                pool: Pool | RayPool
                if on == "ray":
                    pool = stack.enter_context(RayPool(device, workers, own_files, minutes))
                else:
                    used = devices(device, min(at_once(device, workers), len(left())))
                    pool = stack.enter_context(Pool(used, own_files, progress, minutes))
                    ahead = [jobs[index].point.train for index in left()]
                    stack.enter_context(compiling_ahead(ahead, used, own_files))
                while left() and not stopped:
                    pool.run({i: (jobs[i], runs.folders[i]) for i in left()}, keep_weights, look)
                    # the rest is trained by other processes, unless one of them was killed
                    stopped = pool.wait(LOOK_SECONDS if left() else 0)
        if missing := len(left()):
            raise OutOfTime(f"{missing} of {len(wanted)} runs are not finished")
        return [line for index in sorted(runs.lines) for line in runs.lines[index]]
