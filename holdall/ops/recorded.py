"""What recording a CUDA graph needs of Python."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_graph_ends() -> Iterator[None]:
    """Within, no other CUDA graph ends by the garbage collector: CUDA refuses that while one is recorded.

    A graph that nobody has any more, but for a cycle of references, lives until the collector comes; it comes
    before, and not within.
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
