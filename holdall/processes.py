"""Processes that work for another one, and never hear of Ctrl-C: their parent decides what it means."""

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
    """Ctrl-C is blocked in this thread, and stays blocked in a process that is started within.

    A parent that ignored it instead would miss one that is pressed meanwhile; this one gets it afterwards.
    """
    resource_tracker.ensure_running()  # whose own start would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(SpawnProcess):
    """Deaf to Ctrl-C from its first instruction, while it still imports PyTorch too."""

    def start(self) -> None:
        with _ctrl_c_later():
            super().start()


class _Context(SpawnContext):
    Process = _Worker


def context() -> multiprocessing.context.SpawnContext:
    """What `multiprocessing.get_context("spawn")` is, with processes that leave Ctrl-C to this one."""
    return _Context()


def follow_parent() -> None:
    """Of a process that another one started to work for it: leave Ctrl-C to it, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group; the parent says what to do
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end_with_parent() -> None:
        parent.join()  # returns when the parent is gone, kill -9 included
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
