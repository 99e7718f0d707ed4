"""A server for tests: real, on a free local port, in a thread."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdall.engine.fast import Engine, Stats
from holdall.engine.request import Piece, Request, Usage
from holdall.engine.text import Writer
from holdall.language_model import LanguageModel
from holdall.serve.app import HttpServer, create_app
from holdall.serve.server import Server, ServerConfig
from holdall.text.tokenizers import Tokenizer


@dataclass
class Running:
    """A server that runs. `url` has no slash at its end."""

    url: str
    port: int
    server: Server
    http: HttpServer


@contextlib.contextmanager
def running(
    engine: Any, model: LanguageModel, *, folder: Path | None = None, grace: int = 0, **config: Any
) -> Iterator[Running]:
    """Until the end of the block; then what runs there has `grace` seconds."""
    app = create_app(engine, model, ServerConfig(**{"name": "mini", **config}), folder=folder)
    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(app, grace_s=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = listener.getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", port, app.state.server, server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def wait_until(holds: Any, seconds: float = 30) -> None:
    """Wait for a condition; AssertionError if it does not come true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


class WatchedEngine(Engine):
    """Counts how many steps after a cancellation the request's rows were in use.

    late: the steps of each cancelled request between `cancel` and its last piece.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.late: list[int] = []
        self._asked: dict[int, int] = {}

    def cancel(self, ticket: int) -> None:
        super().cancel(ticket)
        self._asked.setdefault(ticket, self.stats().steps)

    def step(self) -> list[Piece]:
        given = super().step()
        for piece in given:
            if piece.finish and piece.ticket in self._asked:
                self.late.append(self.stats().steps - self._asked.pop(piece.ticket))
        return given


class ScriptedEngine:
    """Says the same tokens to everyone, one a step; raises an error in the step `fails_at`."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[int], *, fails_at: int = -1) -> None:
        self.tokenizer, self.tokens, self.fails_at, self.steps = tokenizer, tokens, fails_at, 0
        self.texts: dict[int, tuple[Request, Writer, int]] = {}

    def submit(self, request: Request) -> int:
        ticket = len(self.texts) + self.steps + 1
        self.texts[ticket] = request, Writer(self.tokenizer, (), request.sampling), 0
        return ticket

    def cancel(self, ticket: int) -> None:
        self.texts.pop(ticket, None)

    @property
    def busy(self) -> bool:
        return bool(self.texts)

    def step(self) -> list[Piece]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("a wire is loose")
        given = []
        for ticket, (request, writer, at) in list(self.texts.items()):
            text, finish = writer.add(self.tokens[at])
            usage = Usage(len(request.prompt), 0, at + 1)
            given.append(Piece(ticket=ticket, index=0, text=text, tokens=(), finish=finish, usage=usage))
            self.texts[ticket] = request, writer, at + 1
            if finish:
                del self.texts[ticket]
        return given

    def stats(self) -> Stats:
        return Stats(len(self.texts), 0, 0, 8, 0, 0, self.steps, 0, 0, 0, 0)
