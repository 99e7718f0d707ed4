"""A sweep's runs on a Ray cluster, or on one that is started here: one run for each core, or for each GPU.

Ray chooses where a run is trained, and trains it elsewhere if its process or its machine is lost. All else is
in the sweep's folder, which every machine sees under the same path: a run is claimed there by its lock and
resumed from its checkpoint, so results are the same, and processes without Ray may work beside.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdall.files import RunError
from holdall.sweeps import worker
from holdall.sweeps.config import Job
from holdall.sweeps.pool import LOOK_SECONDS, time_for_training


def join() -> Any:
    """Ray, with this process in the cluster that RAY_ADDRESS or `ray start` names, else in one started here.

    Raises RunError where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise RunError("this needs the package ray: pip install ray") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    return ray


def at_once(device: str) -> int:
    """How many runs the cluster trains at once now: one per core, or per GPU."""
    return int(join().cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))


class RayPool:
    """As `pool.Pool`, on the machines of a cluster; progress is what the runs' folders say.

    Args:
        device: "cpu" or "cuda".
        workers: runs that train at once; None for as many as the cluster has cores or GPUs.
        plugins: the user's own mixer files.
        minutes: the time limit; None for no limit.
    """

    def __init__(
        self, device: str, workers: int | None, plugins: Sequence[str], minutes: float | None
    ) -> None:
        self.ray, self.device, self.workers = join(), "cuda:0" if device == "cuda" else device, workers
        self.plugins = tuple(str(Path(plugin).resolve()) for plugin in plugins)
        self.until = None if minutes is None else time.time() + time_for_training(minutes)
        # a lost process is replaced as often as need be
        needs = {"num_cpus": 1, "num_gpus": 1 if device == "cuda" else 0, "max_retries": -1}
        self.task = self.ray.remote(**needs)(_work)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster, which ends what this process has started in it."""
        self.ray.shutdown()

    def wait(self, seconds: float) -> bool:
        """Wait; returns whether the time is up."""
        time.sleep(seconds)
        return self.until is not None and time.time() >= self.until

    def run(self, jobs: Mapping[int, tuple[Job, Path]], keep_weights: bool, look: Callable[[], None]) -> None:
        """As `Pool.run`. Ctrl-C loses what was trained since the last checkpoints."""
        waiting = list(jobs.values())[::-1]
        running: list[Any] = []
        while waiting or running:
            while waiting and (self.workers is None or len(running) < self.workers):
                job, folder = waiting.pop()
                config = job.point.train.to_dict()
                how = (self.device, self.plugins, self.until)
                running.append(
                    self.task.remote(config, job.together, str(folder.resolve()), keep_weights, how)
                )
            done, running = self.ray.wait(running, timeout=LOOK_SECONDS)
            look()
            for each in done:
                self._raise_of(each)

    def _raise_of(self, task: Any) -> None:
        """Raise what a task raised, in words for its user."""
        try:
            self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, torch.OutOfMemoryError | RunError):
                raise RunError(f"{error.cause}; the same command resumes from the last checkpoints") from None
            raise


def _work(
    config: dict[str, Any],
    together: bool,
    folder: str,
    keep_weights: bool,
    how: tuple[str, tuple[str, ...], float | None],
) -> None:
    """Train a run in a process of the cluster, to which Ray shows one GPU, or none."""
    device, plugins, until = how
    _set_up(device, plugins)
    worker.train_unless_in_use(
        config, Path(folder), device=device, together=together, keep_weights=keep_weights,
        should_stop=lambda: until is not None and time.time() >= until,
    )  # fmt: skip


@functools.cache
def _set_up(device: str, plugins: tuple[str, ...]) -> None:
    """Once in each process: Ray gives it many runs."""
    worker.set_up(device, plugins)
    worker.keep_freed_memory()
