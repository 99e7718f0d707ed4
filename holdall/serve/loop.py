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
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from holdall.engine.fast import Stats
from holdall.engine.request import Piece, Request
from holdall.engine.session import Session

T = TypeVar("T")
OnEnd = Callable[[Session | None], object]
log = logging.getLogger("holdall.serve")


@runtime_checkable
class EngineLike(Protocol):
    """What the loop needs of an engine (holdall/engine/fast.py)."""

    def submit(self, request: Request) -> int: ...
    def cancel(self, ticket: int) -> None: ...
    def step(self) -> list[Piece]: ...
    def stats(self) -> Stats: ...
    @property
    def busy(self) -> bool: ...


class EngineFailedError(Exception):
    """The engine raised an error; the message has it."""


class StoppedError(Exception):
    """The server is shutting down."""


class Arrival(NamedTuple):
    """A piece, and of which of the stream's requests it is."""

    request: int
    piece: Piece


class Stream:
    """The pieces of requests that were submitted together, as they come; made by `EngineLoop.submit`.

    Attributes:
        tickets: the engine's number of each request.
        left: how many texts have not ended; the engine's thread counts.
        began: when it was submitted, by time.perf_counter.
    """

    def __init__(self, requests: Sequence[Request], on_end: OnEnd | None) -> None:
        self.requests, self.on_end = requests, on_end
        self.tickets = list[int]()
        self.left = self._unread = sum(request.n for request in requests)
        self.began = time.perf_counter()
        self.asyncio = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Arrival | Exception] = asyncio.Queue()

    def arrive(self, arrivals: Iterable[Arrival | Exception]) -> None:
        """Called in the event loop of whoever reads."""
        for arrival in arrivals:
            self._arrived.put_nowait(arrival)

    async def __aiter__(self) -> AsyncIterator[Arrival]:
        """Each piece, until all texts have ended; raises what ended them otherwise."""
        while self._unread:
            arrival = await self._arrived.get()
            if isinstance(arrival, Exception):
                raise arrival
            self._unread -= bool(arrival.piece.finish)
            yield arrival


class EngineLoop:
    """Runs an engine in a thread, from `start` to `stop`.

    Attributes:
        stats: the engine's, after the last step.
        failure: the error that ended the loop; "" while there is none.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        watch: Callable[[Stream, Piece], object] = lambda *_: None,
        stepped: Callable[[Stats], object] = lambda _: None,
    ) -> None:
        """`watch` is called in the thread with every piece of every stream, `stepped` after every step."""
        self.engine, self.stats, self.failure = engine, engine.stats(), ""
        self._watch, self._stepped = watch, stepped
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}  # by ticket
        self._thread = threading.Thread(target=self._run, name="holdall-engine", daemon=True)
        self._door = threading.Lock()  # so that nothing comes into the inbox after the last look
        self._stopping = self._closed = False

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Cancel what runs, and take nothing more; does not wait."""
        with contextlib.suppress(StoppedError, EngineFailedError):
            self.call(self._cancel_all)

    def stop(self) -> None:
        """`end`, and wait until the thread has ended."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join()

    # ------------------------------------------------------------------------------------ for other threads

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call a function, between two steps.

        Raises StoppedError or EngineFailedError if the loop has ended.
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

    async def submit(self, requests: Sequence[Request], on_end: OnEnd | None = None) -> Stream:
        """The pieces of requests, all of which were taken.

        `on_end` is called exactly once, when all have ended for whatever reason, or at once if they are not
        taken; with the session after the last piece, if it has one. It must not wait.

        Raises QueueFullError, ValueError for what the engine cannot do, StoppedError and EngineFailedError.
        """
        stream = Stream(requests, on_end)
        try:
            taken = asyncio.wrap_future(self.call(lambda: self._submit(stream)))
        except (StoppedError, EngineFailedError):
            _ended(stream, None)
            raise
        try:
            await asyncio.shield(taken)
        except asyncio.CancelledError:
            self.close(stream)
            raise
        return stream

    def close(self, stream: Stream) -> None:
        """Cancel what has not ended; does not wait, and may be called at any time."""
        with contextlib.suppress(StoppedError, EngineFailedError):
            self.call(lambda: self._cancel(stream))

    # ------------------------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping or self.engine.busy:
                self._read_inbox(wait=not self.engine.busy)
                if self.engine.busy:
                    self._deliver(self.engine.step())
                    self._stepped(self.engine.stats())
                self.stats = self.engine.stats()
        except BaseException as error:
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
            log.exception("The engine failed and takes no more requests; restart the server.")
        with self._door:
            self._closed = True
        for stream in set(self._streams.values()):
            _ended(stream, None)
            _in(stream.asyncio, stream, [self._why_closed()])
        self._streams.clear()
        self._read_inbox(wait=False)  # somebody may wait for what they return

    def _why_closed(self) -> Exception:
        return (
            EngineFailedError(self.failure) if self.failure else StoppedError("the server is shutting down")
        )

    def _read_inbox(self, *, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _submit(self, stream: Stream) -> None:
        try:
            if self._stopping or self._closed:
                raise self._why_closed()
            for request in stream.requests:
                stream.tickets.append(self.engine.submit(request))
        except Exception:
            for ticket in stream.tickets:  # which are in no table: their pieces go nowhere
                self.engine.cancel(ticket)
            _ended(stream, None)
            raise
        self._streams |= dict.fromkeys(stream.tickets, stream)
        self.stats = self.engine.stats()

    def _cancel(self, stream: Stream) -> None:
        for ticket in stream.tickets:
            if ticket in self._streams:
                self.engine.cancel(ticket)

    def _cancel_all(self) -> None:
        self._stopping = True
        for stream in set(self._streams.values()):
            self._cancel(stream)

    def _deliver(self, pieces: Iterable[Piece]) -> None:
        """Hand pieces to their streams, and let go of those that have got their last."""
        arrivals: dict[Stream, list[Arrival]] = defaultdict(list)
        for piece in pieces:
            if (stream := self._streams.get(piece.ticket)) is not None:
                self._watch(stream, piece)
                arrivals[stream].append(Arrival(stream.tickets.index(piece.ticket), piece))
        for stream, its in arrivals.items():
            stream.left -= sum(bool(arrival.piece.finish) for arrival in its)
            if not stream.left:
                for ticket in stream.tickets:
                    del self._streams[ticket]
                _ended(stream, its[-1].piece.session)
            # after `on_end`, so that who reads the end of a text can go on with its session
            _in(stream.asyncio, stream, its)
        if self._streams and not self.engine.busy:
            raise RuntimeError(f"the engine has nothing to do, and {len(self._streams)} requests no end")


def _ended(stream: Stream, session: Session | None) -> None:
    if stream.on_end is not None:
        stream.on_end(session)


def _in(loop: asyncio.AbstractEventLoop, stream: Stream, arrivals: Sequence[Arrival | Exception]) -> None:
    """Have them arrive in an event loop, unless that has ended: then nobody reads."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(stream.arrive, arrivals)
