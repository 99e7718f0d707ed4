"""CUDA graphs for an engine: a call is recorded once, and then launched as one thing.

Python launches a kernel in some microseconds, and a call of a model is hundreds of them: a step of a model of
a billion weights takes fifty milliseconds to launch and two to run.

Letters: B rows, T tokens of a piece, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from holdall.contract import State
from holdall.engine.session import Reader, Session
from holdall.model import Model
from holdall.ops.begun import begun
from holdall.ops.kept import Unchanging
from holdall.ops.recorded import no_graph_ends

T = TypeVar("T")


def record(
    call: Callable[[], T], written: Iterable[Tensor], *, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record what a call does on the GPU; returns the graph, and what the call gave: replays write into it.

    Args:
        call: reads and writes at addresses that stay. It is called twice before, since what is compiled or
            chosen at the first calls is no part of it.
        written: what it writes into, which is then put back as it was.
        pool: the memory of graphs that never run at the same time, `graph.pool()` of the first.
    """
    kept = [(tensor, tensor.clone()) for tensor in written]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with no_graph_ends(), torch.cuda.graph(graph, pool=pool):
        given = call()
    for tensor, values in kept:
        tensor.copy_(values)
    return graph, given


class Desk:
    """One row in which a prompt is read, on a GPU by a graph for each size of a piece.

    For models whose states never grow: the row is of fixed size, and reading is the same for every prompt.
    """

    def __init__(self, model: Model, weights: Unchanging) -> None:
        """`weights`: the promise that they stay as they are, as long as this lives."""
        self.model, self.weights, self.states = model, weights, model.init_states(1)
        self.empty = model.init_states(1)
        self.reader: weakref.ref[Reader] | None = None
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool: Any = None

    def sit(self, reader: Reader, states: list[State] | None) -> None:
        """Give the row to a reader, who has read what these states say; who had it before must have ended."""
        given = self.empty if states is None else states
        for ours, theirs in zip(self._tensors(self.states), self._tensors(given), strict=True):
            ours.copy_(theirs)
        self.reader = weakref.ref(reader)

    def has(self, reader: Reader) -> bool:
        """Whether the row is this reader's."""
        return self.reader is not None and self.reader() is reader

    @torch.no_grad()
    def read(self, tokens: Sequence[int], *, prefix: bool = False) -> Tensor:
        """Read the next piece; the logits after it, (V,), which the next piece may overwrite.

        A prefix may be of any size and comes once, so that no graph is recorded for it.
        """
        if self.model.device.type == "cpu" or prefix:
            return self._call(torch.tensor([tokens], device=self.model.device), prefix=prefix)
        self.record(len(tokens))
        graph, token_1T, logits_V = self.graphs[len(tokens)]
        # from pinned memory: else the host would wait for all that is under way
        token_1T.copy_(torch.tensor([tokens]).pin_memory(), non_blocking=True)
        graph.replay()
        return logits_V

    def copy(self) -> list[State]:
        """The states, as they are now."""
        return [type(state)(*(tensor.clone() for tensor in state)) for state in self.states]

    def record(self, size: int) -> None:
        """Record the reading of pieces of this size, if they were not."""
        if size in self.graphs:
            return
        token_1T = torch.zeros(1, size, dtype=torch.long, device=self.model.device)

        call = functools.partial(self._call, token_1T)
        graph, logits_V = record(call, self._tensors(self.states), pool=self.pool)
        self.pool = graph.pool()
        self.graphs[size] = (graph, token_1T, logits_V)

    def _call(self, token_1T: Tensor, *, prefix: bool = False) -> Tensor:
        with self.weights, begun(not prefix):
            h_1TD, _ = self.model.hidden(token_1T, self.states, inplace=True)
            return self.model.logits(h_1TD[0, -1]).float()

    @staticmethod
    def _tensors(states: Iterable[State]) -> list[Tensor]:
        return [*itertools.chain(*states)]


class DeskReader(Reader):
    """A reader whose pieces are recorded calls; one reads at a desk at a time."""

    def __init__(self, desk: Desk, tokens: Sequence[int], start: Session | None, **how: Any) -> None:
        super().__init__(desk.model, tokens, start, **how)
        self.desk = desk

    def _read(self, tokens: Sequence[int]) -> None:
        if not self.desk.has(self):
            self.desk.sit(self, self.states)
        self.logits_V = self.desk.read(tokens, prefix=self.model.prefix > 0 and not self.past.count)

    def alike(self, other: Reader) -> bool:
        return other is self

    def session(self) -> Session:
        if not self.desk.has(self):
            return super().session()
        assert self.logits_V is not None
        return Session(self.desk.copy(), self.logits_V.clone(), self.past)
