"""Processes that tests start, kill and start again.

They are forked from one that has imported PyTorch and Holdall already: a fresh Python takes seconds for that,
which a test that starts five of them should not.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from holdall import files


def context() -> ForkServerContext:
    """A "forkserver" of multiprocessing, whose server has Holdall's trainings ready."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["holdall.training.language_models", "holdall.sweeps.sweep"])
    return made


def start(function: Callable[..., Any], *args: Any, **options: Any) -> BaseProcess:
    """Call a function in a process of its own, on one thread as the tests themselves."""
    process = context().Process(target=_on_one_thread, args=(function, args, options))
    process.start()
    return process


def _on_one_thread(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    function(*args, **options)


def kill_and_resume(
    train: Callable[..., Any],
    config: Any,
    folder: Path,
    *,
    at: Sequence[int],
    checkpoint: str,
    **options: Any,
) -> None:
    """Train in a process that is killed (kill -9) and started again, several times, and then left alone.

    at: lines of the run's metrics.jsonl after which it is killed. checkpoint: a file that must be there by
    then, or nothing would be resumed.
    """
    for lines in at:
        process = start(train, config, folder, checkpoint_seconds=0.02, **options)
        until = time.monotonic() + 60
        while len(files.read_lines(folder / "metrics.jsonl")) < lines or not (folder / checkpoint).exists():
            assert process.is_alive(), f"it ended before it could be killed, with status {process.exitcode}"
            assert time.monotonic() < until, f"no {lines} lines in a minute"
            time.sleep(0.002)
        process.kill()
        process.join()
        assert not (folder / "result.json").exists(), "it was finished before it could be killed"
    last = start(train, config, folder, **options)
    last.join(120)
    assert last.exitcode == 0
