"""Worker processes, which ignore Ctrl-C: their parent decides what it means."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Block SIGINT in this thread and in the processes that it starts meanwhile.

    Blocked signals are delivered to the parent afterwards; if it ignored them instead, they would be lost.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(SpawnProcess):
    """Ignores Ctrl-C from its first instruction on, also while it still imports PyTorch."""

    def start(self) -> None:
        with _ctrl_c_later():
            super().start()


class _Context(SpawnContext):
    Process = _Worker


def context() -> multiprocessing.context.SpawnContext:
    """As `multiprocessing.get_context("spawn")`, with processes that leave Ctrl-C to this one."""
    return _Context()


def follow_parent() -> None:
    """To be called in a worker process: ignore Ctrl-C, and exit when the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole process group; the parent handles it
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end_with_parent() -> None:
        parent.join()  # returns when the parent has ended, by kill -9 too
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
