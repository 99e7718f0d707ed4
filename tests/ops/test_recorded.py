"""Nothing ends while a CUDA graph is recorded; what nobody has any more ends before."""

from __future__ import annotations

import gc
import weakref

import pytest

from holdall.ops.recorded import no_graph_ends


class Cycle:
    """What only the garbage collector ends, as a population and its recordings."""

    def __init__(self) -> None:
        self.own = self
        self.many = [[i] for i in range(2000)]  # the collector comes by the number of objects


def test_what_is_left_ends_before_and_what_is_dropped_within_ends_after() -> None:
    before = weakref.ref(Cycle())
    with no_graph_ends():
        assert before() is None
        within = [weakref.ref(Cycle()) for _ in range(50)]
        assert all(ref() is not None for ref in within)
    assert gc.isenabled()
    gc.collect()
    assert all(ref() is None for ref in within)


def test_an_error_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="stop"), no_graph_ends():
        raise RuntimeError("stop")
    assert gc.isenabled()
    gc.disable()
    try:
        with no_graph_ends():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
