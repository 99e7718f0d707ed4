"""The engine in a thread of its own, and streams of its pieces for asyncio.

An engine is not thread-safe and its steps take long, so one thread owns it: whatever else wants something of
it leaves a function in the thread's inbox, which runs between two steps. Pieces go the other way, to the
event loop of whoever reads their stream, in one callback per step.

If the engine raises an error in a step, its rows are in no known state. So all streams end with that error,
it is logged, and no more requests are taken; `failure` says why, and /health reports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from holdall.engine.request import Piece, Request
from holdall.engine.session import Session

T = TypeVar("T")
OnEnd = Callable[[Session | None], object]
log = logging.getLogger("holdall.serve")


class EngineLike(Protocol):
    """What the loop needs of an engine (holdall/engine/fast.py)."""

    def submit(self, request: Request) -> int: ...
    def cancel(self, ticket: int) -> None: ...
    def step(self) -> list[Piece]: ...
    def stats(self) -> Any: ...
    @property
    def busy(self) -> bool: ...


class EngineFailedError(Exception):
    """The engine raised an error; the message has it."""


class StoppedError(Exception):
    """The server is shutting down."""


class Stream:
    """The pieces of one request, as they come; made by `EngineLoop.submit`.

    Attributes:
        request: what was asked.
        ticket: the engine's number of it.
        left: how many of its texts have not ended; the engine's thread counts.
    """

    def __init__(self, request: Request, on_end: OnEnd | None) -> None:
        self.request, self.on_end = request, on_end
        self.ticket, self.left = -1, request.n
        self.asyncio = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def arrive(self, pieces: Sequence[Piece | Exception]) -> None:
        """Called in the event loop of whoever reads."""
        for piece in pieces:
            self._arrived.put_nowait(piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Each piece, until all texts have ended; raises what ended them otherwise."""
        left = self.request.n
        while left:
            piece = await self._arrived.get()
            if isinstance(piece, Exception):
                raise piece
            left -= bool(piece.finish)
            yield piece


class EngineLoop:
    """Runs an engine in a thread from `start` to `stop`.

    Attributes:
        stats: the engine's, after the last step.
        failure: the error that ended the loop; "" while there is none.
    """

    def __init__(
        self, engine: EngineLike, *, watch: Callable[[Stream, list[Piece]], object] = lambda *_: None
    ) -> None:
        """`watch` is called in the thread with the pieces of a stream, before they leave it."""
        self.engine, self.stats, self.failure = engine, engine.stats(), ""
        self._watch = watch
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="holdall-engine", daemon=True)
        self._stopping = False
        self._door = threading.Lock()  # nothing is left in the inbox after the last look into it
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closed

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs, and end the thread; streams end with "cancelled" or StoppedError."""
        if self._thread.is_alive():
            with contextlib.suppress(StoppedError, EngineFailedError):
                self.call(self._cancel_all)
            self._thread.join()

    # --------------------------------------------------------------------------------- from other threads

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call a function, between two steps.

        Raises StoppedError or EngineFailedError if the loop has ended; the future does if it ends before.
        """
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._door:
            if self._closed:
                raise self._why_closed()
            self._inbox.put(job)
        return future

    async def submit(self, requests: Sequence[Request], on_end: OnEnd | None = None) -> list[Stream]:
        """Streams of requests, all of which were taken; or of none.

        `on_end` is called in the engine's thread when a request has ended for any reason, with the session
        after it if there is one. If no stream is returned, it is not called.

        Raises QueueFullError, ValueError for what the engine cannot do, StoppedError and EngineFailedError.
        """
        streams = [Stream(request, on_end) for request in requests]
        taken = self.call(lambda: self._submit(streams))
        try:
            await asyncio.wrap_future(taken)
        except asyncio.CancelledError:
            self.close(streams)
            raise
        return streams

    def close(self, streams: Sequence[Stream]) -> None:
        """Cancel what has not ended; does not wait, and may be called at any time."""
        with contextlib.suppress(StoppedError, EngineFailedError):
            self.call(lambda: self._cancel(streams))

    # --------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while not (self._stopping and not self.engine.busy):
                self._read_inbox(wait=not self.engine.busy)
                if self.engine.busy:
                    self._deliver(self.engine.step())
                self.stats = self.engine.stats()
        except BaseException as error:
            log.exception("the engine failed; restart the server")
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
        with self._door:
            self._closed = True
        for stream in list(self._streams.values()):
            self._end(stream, None, self._why_closed())
        while not self._inbox.empty():  # such as cancellations, and functions whose futures are waited for
            with contextlib.suppress(Exception):
                self._inbox.get()()

    def _why_closed(self) -> Exception:
        return EngineFailedError(self.failure) if self.failure else StoppedError("the server is shutting down")

    def _read_inbox(self, *, wait: bool) -> None:
        if wait and not self._stopping:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _submit(self, streams: Sequence[Stream]) -> None:
        if self._stopping or self._closed:
            raise self._why_closed()
        taken = []
        try:
            for stream in streams:
                stream.ticket = self.engine.submit(stream.request)
                taken.append(stream)
        except Exception:
            for stream in taken:
                self.engine.cancel(stream.ticket)  # in no table, so that their pieces go nowhere
            raise
        self._streams |= {stream.ticket: stream for stream in taken}
        self.stats = self.engine.stats()

    def _cancel(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if stream.ticket in self._streams:
                self.engine.cancel(stream.ticket)

    def _cancel_all(self) -> None:
        self._stopping = True
        self._cancel(list(self._streams.values()))

    def _deliver(self, pieces: Sequence[Piece]) -> None:
        """Hand pieces to their streams, and end those that have got their last."""
        by_stream: dict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_stream[piece.ticket].append(piece)
        by_loop: dict[Any, list[tuple[Stream, list[Piece]]]] = defaultdict(list)
        for ticket, its in by_stream.items():
            if (stream := self._streams.get(ticket)) is None:
                continue
            self._watch(stream, its)
            stream.left -= sum(bool(piece.finish) for piece in its)
            by_loop[stream.asyncio].append((stream, its))
            if not stream.left:
                del self._streams[ticket]
                if stream.on_end is not None:
                    stream.on_end(its[-1].session)
        for loop, arrivals in by_loop.items():
            _in(loop, lambda arrivals=arrivals: [stream.arrive(its) for stream, its in arrivals])
        if self._streams and not self.engine.busy:
            raise RuntimeError(f"the engine has nothing to do, and {len(self._streams)} requests have no end")

    def _end(self, stream: Stream, session: Session | None, error: Exception) -> None:
        self._streams.pop(stream.ticket, None)
        if stream.on_end is not None:
            stream.on_end(session)
        _in(stream.asyncio, lambda: stream.arrive([error]))


def _in(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call a function in an event loop, if that has not ended: then nobody reads any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
