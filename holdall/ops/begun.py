"""Whether all rows have read something: then no row's prefix, which is read at its start, is to be read.

    with begun():            whoever enters promises it of every call within
        model.hidden(...)

Only the device knows how much a row has read. A mixer with a prefix that could not be told would read one in
every step of decoding, and drop it: twice as much memory traffic as the step itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch


@contextlib.contextmanager
def begun(promised: bool = True) -> Iterator[None]:
    """Within, every row of every call has read something, if that is promised."""
    before = _promised.set(promised)
    try:
        yield
    finally:
        _promised.reset(before)


def all_begun() -> bool:
    """Whether that is promised here."""
    return not torch.compiler.is_compiling() and _promised.get()


_promised: ContextVar[bool] = ContextVar("begun", default=False)
