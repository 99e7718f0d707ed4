"""What recording a CUDA graph needs of Python."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_graph_ends() -> Iterator[None]:
    """Disables garbage collection while a CUDA graph is recorded: to destroy another one then is an error.

    A graph that nobody has any more, but for a cycle of references, lives until the collector comes; it comes
    before, and not within. Of the whole process: one thread at a time may record.
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
