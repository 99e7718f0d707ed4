"""Run a sweep: train what is missing in its folder, and write down each result as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdall import files, settings
from holdall.contract import did_you_mean
from holdall.settings import NonNegativeFloat
from holdall.sweeps.compile_ahead import compiling_ahead
from holdall.sweeps.config import SweepConfig, in_order
from holdall.sweeps.folder import OutOfTime, claimed, other_lines, planned, write_results
from holdall.sweeps.pool import Pool, at_once, devices
from holdall.sweeps.published import Published
from holdall.sweeps.result import result_line
from holdall.training.populations import Progress, finished


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
    keep_weights: bool = True,
    published: bool = False,
    laws: Mapping[str, Mapping[str, Any]] | None = None,
    watcher: Watcher | None = None,
) -> list[dict[str, Any]]:
    """Run a sweep, or resume it, and return its lines of results.jsonl.

    The folder may hold more models, which earlier calls added: they stay there.

    Args:
        out: the sweep's folder.
        command: what the user typed, kept in config.json.
        device: "cpu" or "cuda", which is all GPUs of the machine.
        workers: runs that train at once, each in a process; by default one per core, or per GPU.
        plugins: the user's own files of mixers, tasks and recipes.
        families: train only these now; finished runs of the others count all the same.
        minutes: stop within this time and keep what is finished by then; None for no limit.
        together: whether a population is one run; by default on a GPU.
        keep_weights: whether runs keep their trained weights.
        published: do not train models of which runs were published: those are shown, where this folder has
            none.
        laws: by label, which laws a model's mixer breaks or refuses, as kept in its lines.

    Raises:
        ValueError: the sweep has no such family.
        RunError: the folder cannot be written, is in use, or holds another sweep; or a worker died.
        OutOfTime: something is still to be trained.
        KeyboardInterrupt: after every run has written its checkpoint.
    """
    for family in families:
        if family not in sweep.families:
            raise ValueError(f"unknown family '{family}'. {did_you_mean(family, sweep.families)}")
    if minutes is not None:
        settings.check("minutes", minutes, NonNegativeFloat)
    together = device != "cpu" if together is None else together
    workers = at_once(device, workers)
    watcher = watcher or Watcher()
    with files.locked(out), contextlib.ExitStack() as stack:
        jobs = planned(sweep, out, together=together)
        runs = [out / "runs" / job.folder for job in jobs]
        stack.enter_context(claimed(out, sweep, command, device, runs))
        lines: dict[int, list[dict[str, Any]]] = {}
        others, come_with = other_lines(out, sweep), Published(sweep) if published else None
        watcher.others(others)

        def record(index: int, these: list[dict[str, Any]]) -> None:
            verdict = (laws or {}).get(jobs[index].point.label)
            lines[index] = [{**line, "laws": verdict} for line in these] if verdict else these
            watcher.finished(index, lines[index])

        def write() -> None:
            write_results(out, [*(line for index in sorted(lines) for line in lines[index]), *others])

        for index, (job, run) in enumerate(zip(jobs, runs, strict=True)):
            if (results := finished(job.point.train, run)) is not None:
                record(index, [result_line(job, sweep, result) for result in results])
            elif come_with and (there := come_with.of(job)) is not None:
                record(index, there)
        write()
        wanted = [i for i in in_order(jobs) if not families or jobs[i].point.family in families]
        left = {index: (jobs[index], runs[index]) for index in wanted if index not in lines}
        if left and minutes != 0:
            used, own_files = devices(device, min(workers, len(left))), [str(path) for path in plugins]
            configs = [job.point.train for job, _ in left.values()]
            pool = stack.enter_context(Pool(used, own_files, watcher.progress, minutes))
            stack.enter_context(compiling_ahead(configs, used, own_files))
            for index, results in pool.results(left, keep_weights):
                record(index, [result_line(jobs[index], sweep, result) for result in results])
                write()
        if missing := len(set(left) - set(lines)):
            raise OutOfTime(f"{missing} of {len(wanted)} runs are not finished")
    return [line for index in sorted(lines) for line in lines[index]]
