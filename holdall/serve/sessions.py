"""Named sessions: in memory, and in a folder if there is one.

A session goes on with one request at a time. After each request it is written to its file, behind the
request's back, so that a crash loses at most what was not written yet; those that memory has no place for are
read from their files when they are asked for. Without a folder, a new one is refused when memory is full.

Sessions are kept on the CPU. The engine's thread moves them there, and loads files: on a GPU another thread's
copies would be an error while a step is recorded.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from holdall.contract import StateError, describe_states
from holdall.contract.state import Position
from holdall.engine.session import CHUNK, RECENT, Session, load_session, read, save_session
from holdall.errors import message
from holdall.files import RunError
from holdall.language_model import LanguageModel

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""One path component on every system; none is hidden."""
SUFFIX = ".safetensors"
log = logging.getLogger("holdall.serve")


class SessionError(Exception):
    """A session cannot be had; `status` is the HTTP status, `code` a word for programs."""

    def __init__(self, status: int, code: str, says: str) -> None:
        super().__init__(says)
        self.status, self.code = status, code


class Listed(NamedTuple):
    """A session in the list."""

    name: str
    tokens: int
    bytes: int


@dataclass(eq=False)
class _Entry:
    """session: None if it is in its file only, or nothing was read yet; `written`: the file is as new."""

    session: Session | None = None
    tokens: int = 0
    nbytes: int = 0
    busy: bool = False
    written: bool = False


class Sessions:
    """The sessions of a server. Any thread may call it."""

    def __init__(self, model: LanguageModel, folder: Path | None, memory: int) -> None:
        """`memory`: bytes of sessions that are kept there. Raises OSError if the folder cannot be made."""
        self.model, self.folder, self.memory = model, folder, memory
        self.fingerprint = model.fingerprint
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the last one used is the last
        self._writer = ThreadPoolExecutor(1, "holdall-sessions")  # one: the last write wins
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._find(folder)

    def close(self) -> None:
        """Wait until all are written."""
        self._writer.shutdown()

    def list(self) -> list[Listed]:
        with self._lock:
            items = [(name, entry) for name, entry in self._entries.items() if entry.tokens]
            return sorted(Listed(name, entry.tokens, entry.nbytes) for name, entry in items)

    # ------------------------------------------------------------------------------------------ in requests

    def begin(self, name: str) -> bool:
        """Take a session for a request, until `end`; returns whether there is one to go on with.

        Raises SessionError for a bad name, one in use, and for a new one if memory is full.
        """
        check_name(name)
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                if self.folder is None and self._in_memory() >= self.memory:
                    says = f"sessions take {self.memory:,} bytes, and no more may: delete one first"
                    raise SessionError(400, "sessions_full", says)
                entry = self._entries[name] = _Entry()
            self._take(name, entry)
            return entry.tokens > 0

    def get(self, name: str) -> Session:
        """The session that was begun; in the engine's thread, as it may be loaded from its file.

        Raises SessionError if the file cannot be read any more.
        """
        with self._lock:
            entry = self._entries[name]
            if entry.session is None:
                entry.session = self.load(self._path(name)).to("cpu")
                entry.written = True
            return entry.session

    def end(self, name: str, session: Session | None) -> None:
        """Give a session back, with what has been read since; None leaves it as it was."""
        with self._lock:
            entry = self._entries[name]
            entry.busy = False
            if session is not None:
                self._set(name, entry, session)
            elif not entry.tokens:
                del self._entries[name]

    # ------------------------------------------------------------------------------------------ as files

    def put(self, name: str, session: Session) -> None:
        """Take a session from elsewhere, in place of what there was. Raises SessionError, as `begin`."""
        self.begin(name)
        self.end(name, session)

    def delete(self, name: str) -> None:
        """Raises SessionError if there is none, or it is in use."""
        with self._lock:
            self._take(name, self._known(name))
            del self._entries[name]
            if self.folder is not None:
                self._writer.submit(self._path(name).unlink, missing_ok=True)

    def file(self, name: str) -> bytes:
        """A session as the content of a file. Raises SessionError if there is none, or it is in use."""
        with self._lock:
            entry = self._known(name)
            if entry.busy:
                raise _busy(name)
            session = entry.session
        if session is None:
            return self._path(name).read_bytes()
        with tempfile.TemporaryDirectory(prefix="holdall-") as folder:
            path = Path(folder) / f"{name}{SUFFIX}"
            save_session(session, path, model=self.fingerprint)
            return path.read_bytes()

    def load(self, path: Path) -> Session:
        """The session in a file, which may come from anybody; in the engine's thread.

        Raises SessionError that says what is wrong with it: a session that the engine could not go on with
        would end all of its requests.
        """
        model = self.model.model
        try:
            if not describe_states(path).model:
                raise StateError(f"{path} does not name its model")
            session = load_session(path, model, fingerprint=self.fingerprint)
            past = session.past
            numbers = (past.count, *past.tail, *past.recent)
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise StateError(f"{path} has a past of no tokens")
            tokens = (*past.tail, *past.recent)
            if max(tokens, default=0) >= model.config.vocab or not 1 <= len(past.recent) <= RECENT:
                raise StateError(f"{path} has a past of no tokens of this model")
            if len(past.tail) != past.count % CHUNK or len(past.grid) != (16 if past.count >= CHUNK else 0):
                raise StateError(f"{path} has a past that does not fit its count")
            vocab = (model.config.vocab,)
            if session.logits_V.shape != vocab or session.logits_V.dtype != torch.float32:
                raise StateError(f"{path} has no logits of this model")
            if any(tensor.shape[0] != 1 for state in session.states for tensor in state):
                raise StateError(f"{path} has more than one row")
            positions = [state for state in session.states if isinstance(state, Position)]
            if any(int(state[0]) != past.count for state in positions):
                raise StateError(f"{path} is at another position than its past")
            if not model.config.positions or past.count < model.config.positions:
                read(model, [0], session)  # whatever else is wrong with it shows here
        except (OSError, RunError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            says = message(error).replace(str(path), "the file")
            raise SessionError(400, "bad_session_file", says) from error
        return session

    # ------------------------------------------------------------------------------------------ within

    def _find(self, folder: Path) -> None:
        """List what is in the folder, without reading any tensors."""
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            with contextlib.suppress(SessionError):
                check_name(path.stem)
                try:
                    described = describe_states(path)
                except (OSError, RunError, ValueError) as error:
                    log.warning("%s is left alone: %s", path, message(error))
                    continue
                if described.model != self.fingerprint:
                    log.warning("%s is left alone: it is of model %s", path, described.model or "unknown")
                    continue
                tokens = (described.tokens_read or [1])[0]
                self._entries[path.stem] = _Entry(None, tokens, path.stat().st_size, written=True)

    def _set(self, name: str, entry: _Entry, session: Session) -> None:
        session = session.to("cpu")
        entry.session, entry.tokens, entry.nbytes = session, session.past.count, session.nbytes
        entry.written = False
        if self.folder is not None:
            with contextlib.suppress(RuntimeError):  # after `close`
                self._writer.submit(self._write, name, entry, session)

    def _write(self, name: str, entry: _Entry, session: Session) -> None:
        """Write a session to its file; then memory can do without it."""
        try:
            with self._lock:
                if self._entries.get(name) is not entry or entry.session is not session:
                    return  # deleted, or a newer one is to be written
            save_session(session, self._path(name), model=self.fingerprint)
        except OSError as error:
            log.error("session %s cannot be written, and stays in memory: %s", name, message(error))
            return
        with self._lock:
            entry.written = entry.session is session
            for other in self._unused():
                if self._in_memory() <= self.memory:
                    break
                other.session = None

    def _unused(self) -> Iterator[_Entry]:
        """Entries that memory can do without, those used longest ago first."""
        return (entry for entry in self._entries.values() if entry.written and not entry.busy)

    def _in_memory(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values() if entry.session is not None)

    def _known(self, name: str) -> _Entry:
        check_name(name)
        if (entry := self._entries.get(name)) is None or not (entry.tokens or entry.busy):
            raise SessionError(404, "session_not_found", f"there is no session {name}")
        return entry

    def _take(self, name: str, entry: _Entry) -> None:
        if entry.busy:
            raise _busy(name)
        entry.busy = True
        self._entries.move_to_end(name)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{SUFFIX}"


def check_name(name: str) -> None:
    """Raise SessionError if a name cannot be a file's."""
    if not NAME.fullmatch(name):
        says = (
            "a session's name is 1 to 100 letters, digits, _, - and ., and begins with none of the last two"
        )
        raise SessionError(400, "bad_session_name", says)


def _busy(name: str) -> SessionError:
    return SessionError(409, "session_in_use", f"session {name} is in use by another request")
