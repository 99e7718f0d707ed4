"""What every training has, whatever it trains: a background writer, and how it is stopped."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Training was asked to stop; its state is in the run folder."""


class Background:
    """Another thread that does one thing at a time, such as writing a checkpoint, while training goes on."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._doing: concurrent.futures.Future[None] | None = None

    def do(self, function: Callable[..., None], *args: Any) -> None:
        """Begin with it, once what was begun before is done; raises what went wrong with that."""
        self.wait()
        self._doing = self._thread.submit(function, *args)

    def wait(self) -> None:
        """Until it is done; raises what went wrong with it."""
        if self._doing is not None:
            doing, self._doing = self._doing, None
            doing.result()

    def close(self) -> None:
        self._thread.shutdown()
