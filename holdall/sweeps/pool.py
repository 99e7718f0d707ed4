"""The processes that train a sweep's runs, one for each core or GPU; time limits and Ctrl-C stop them."""

from __future__ import annotations

import concurrent.futures
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from holdall import environment, processes, settings
from holdall.files import RunError
from holdall.settings import PositiveInt
from holdall.sweeps import worker
from holdall.sweeps.config import Job
from holdall.training.populations import Progress

LOOK_SECONDS = 1.0
"""Between one look at what others have finished and the next."""


def at_once(device: str, workers: int | None = None) -> int:
    """How many runs train at once: by default one per core, or per GPU."""
    if workers is not None:
        settings.check("workers", workers, PositiveInt)
        return workers
    return torch.cuda.device_count() if device == "cuda" else environment.cores()


def devices(device: str, workers: int) -> list[str]:
    """The device of each worker: a machine's GPUs in turn."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{index % count}" if count else device for index in range(workers)]


def time_for_training(minutes: float) -> float:
    """Seconds of a time limit; the rest is for the last steps and for writing checkpoints."""
    return 60 * minutes - min(15.0, 6 * minutes)


class Pool:
    """Processes that train, and the thread that passes on their progress.

    Args:
        devices: of each process; "cpu" or "cuda:N".
        plugins: the user's own mixer files.
        on_progress: called with a run's index and its progress, from the thread.
        minutes: the time limit; None for no limit.
    """

    def __init__(
        self,
        devices: Sequence[str],
        plugins: Sequence[str],
        on_progress: Callable[[int, Progress], None],
        minutes: float | None,
    ) -> None:
        self.context = context = processes.context()
        self.stop, self.progress, free = context.Event(), context.Queue(), context.Queue()
        for name in devices:
            free.put(name)
        self.executor = concurrent.futures.ProcessPoolExecutor(
            len(devices),
            mp_context=context,
            initializer=worker.start,
            initargs=(self.progress, self.stop, free, plugins),
        )
        self.on_progress = on_progress
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.interrupted = False
        self.timer: threading.Timer | None = None
        if minutes is not None:
            self.timer = threading.Timer(time_for_training(minutes), self.stop.set)

    def __enter__(self) -> Pool:
        self.listener.start()
        if self.timer:
            self.timer.daemon = True
            self.timer.start()
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.timer:
            self.timer.cancel()
        self.executor.shutdown(cancel_futures=True)
        self.progress.put(None)
        self.listener.join()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _interrupt(self, *_: object) -> None:
        """Ctrl-C asks the workers to stop and write their checkpoints; pressed again, it is the usual one.

        Not an exception at once: that could surface anywhere, even in code that swallows it.
        """
        self.interrupted = True
        self.stop.set()
        signal.signal(signal.SIGINT, self.before)

    def wait(self, seconds: float) -> bool:
        """Wait; returns whether the time is up. Raises KeyboardInterrupt as `run`."""
        stopped = self.stop.wait(seconds)
        if self.interrupted:
            raise KeyboardInterrupt
        return stopped

    def _listen(self) -> None:
        while (report := self.progress.get()) is not None:
            self.on_progress(*report)

    def run(self, jobs: Mapping[int, tuple[Job, Path]], keep_weights: bool, look: Callable[[], None]) -> None:
        """Train runs, by their index, until each is finished, stopped or found to be trained by others.

        look: called about once a second, and after each run.

        Raises:
            KeyboardInterrupt: Ctrl-C; every run has written its checkpoint.
            RunError: a run was refused, a worker died, or the GPU's memory is too small.
        """
        left = {
            self.executor.submit(
                worker.work, index, job.point.train.to_dict(), job.together, str(folder), keep_weights
            )
            for index, (job, folder) in jobs.items()
        }
        while left:
            done, left = concurrent.futures.wait(left, LOOK_SECONDS, concurrent.futures.FIRST_COMPLETED)
            look()
            if self.interrupted:
                raise KeyboardInterrupt
            for future in done:
                _raise_of(future)


def _raise_of(future: concurrent.futures.Future[None]) -> None:
    """Raise what a run's process raised, in words for its user."""
    try:
        future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise RunError(
            "a training process died, most likely out of memory; the same command resumes from the last "
            "checkpoints (--workers sets how many runs train at once)"
        ) from None
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the GPU's memory is too small for the runs that train at once ({error}); the same command "
            "resumes from the last checkpoints (--workers sets how many train at once)"
        ) from error
