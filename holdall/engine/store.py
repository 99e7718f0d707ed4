"""Sessions by what they have read: a prompt whose beginning was read before is resumed from there.

    store = StateStore(StoreConfig(folder="states"), fingerprint=lm.fingerprint, model=lm.model)
    session = store.longest(prompt)           what has read the longest beginning of the prompt, or None
    session, shared = store.resume(prompt)    and an earlier prompt agrees up to there: worth a snapshot
    store.put(session)                 found from now on; with pin=True for ever, such as a system prompt
    store.flush()                      before a shutdown: what is only in memory is written to the folder

Sessions are values. The store keeps copies of its own, in host memory whatever the model's device, and
returns copies on the model's device: whatever callers do with their tensors, what is stored stays as it was
put. A session that is resumed gives the bits that `read` gives when it is cut at the same tokens. From a GPU
the copy to host memory runs beside its other work, and is waited for only by who needs it.

A lookup hashes the prompt once, however many sessions are stored. Its tokens go block by block, as in `Past`,
through a running hash. Where a stored session ends under the same grid point, with as many tokens after it,
the hash up to there is looked up: that is at CHUNK places of each block at most.

    memory    Sessions in order of last use. A new one makes the least recently used ones leave; pinned ones
              never do. The limit holds at every moment, also within `put`.
    folder    What leaves memory is written there, a file per session, in a folder per model and dtype. Files
              are written atomically and not changed, so that a killed process loses only what was only in
              memory. Beyond the limit, the files that were used longest ago are removed. A file's
              modification time is when it was last used or written, for all processes that share the folder.

Not thread-safe: one thread calls it. The folder is listed when the store is made and whenever it writes: then
it sees the files of other processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import struct
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from holdall import files
from holdall.contract import Config, StateError, describe_states, map_state
from holdall.contract.state_file import STATE_FORMAT
from holdall.engine.session import CHUNK, Past, Session, chained, load_session, misfit_of, save_session
from holdall.files import RunError
from holdall.model import Model
from holdall.settings import NonNegativeInt, PositiveInt, Range, check

Miss = Literal["nothing stored", "shorter than a grid point", "no stored beginning"]
"""Why no session was found. Before the first grid point there are no shared snapshots, only whole prompts."""


class PinError(ValueError):
    """A session to be pinned does not fit beside those that are."""


class StoreWarning(UserWarning):
    """A session could not be written to the store's folder, and is lost."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Config):
    """How much a store keeps, and where."""

    memory: PositiveInt = 1 << 30
    """Bytes of the sessions in host memory at most: their states and logits. For a model on a GPU it is
    page-locked memory, of which PyTorch takes a power of two bytes for each tensor."""
    folder: str | None = None
    """Where sessions that leave memory are written, and found again after a restart; None to drop them."""
    disk: Annotated[int, Range(above=0, zero="no limit")] = 16 << 30
    """Bytes of the model's files in the folder at most; 0 for no limit."""
    points: PositiveInt = 1 << 16
    """How many grid points of earlier prompts, one per 512 tokens, are remembered: 8 bytes of hash each."""


class StoreStats(NamedTuple):
    """What a store holds, and what it has done since it was made.

    sessions, pinned: how many, in memory or files; how many of them never leave memory.
    bytes, files, file_bytes: of the sessions in memory; number and size of the files known.
    hits, file_hits: calls of `longest` that found a session; in how many of them it came from a file.
    misses: those that found none, by reason.
    tokens_saved: tokens that sessions found had read.
    evictions: sessions that left memory for others.
    too_large: sessions that were not kept because they exceed what is not pinned of a limit.
    damaged: files that were damaged, and removed.
    unwritten: sessions lost because their files could not be written.
    """

    sessions: int
    pinned: int
    bytes: int
    files: int
    file_bytes: int
    hits: int
    file_hits: int
    misses: Mapping[Miss, int]
    tokens_saved: int
    evictions: int
    too_large: int
    damaged: int
    unwritten: int


class StateStore:
    """See the top of this file. Equal pasts are one entry: the session that came first stays."""

    def __init__(self, config: StoreConfig | None = None, *, fingerprint: str, model: Model) -> None:
        """Finds the files that are there by their headers; no tensor is loaded.

        Args:
            config: the defaults if None.
            fingerprint: of the model; files of other models are left alone.
            model: whose sessions these are; found ones are on its device.

        Raises ValueError if there is a folder and no fingerprint, RunError if the folder cannot be used.
        """
        self.config = config = config or StoreConfig()
        self._model, self._ends = model, _Ends()
        self._memory: OrderedDict[bytes, _Kept] = OrderedDict()  # the least recently used first
        self._points: OrderedDict[bytes, None] = OrderedDict()  # the same
        self._counts: Counter[str] = Counter()
        self._misses: Counter[Miss] = Counter()
        self._nbytes = self._pinned_bytes = 0
        self._folder: _Folder | None = None
        if config.folder is not None:
            if not fingerprint:
                raise ValueError("a store with a folder needs the model's fingerprint, which is empty")
            self._folder = _Folder(config, fingerprint, model, self._ends, self._counts)

    # ------------------------------------------------------------------------------------------ lookups

    def longest(self, tokens: Sequence[int], *, most: int | None = None) -> Session | None:
        """The session that has read the longest beginning of these tokens, the caller's own copy.

        That may be all of them: then nothing needs to be read, since a session has the next token's logits.

        Args:
            tokens: of the prompt, from the document's beginning.
            most: take at most so many of them.

        A file that is damaged or gone is passed over for the next longest.
        """
        beginning = self._beginning(tokens)
        if most is not None:
            check("most", most, NonNegativeInt)
            tokens = tokens[:most]
        return self._longest(self._ends.along(tokens, beginning)[0], len(tokens))

    def resume(self, tokens: Sequence[int]) -> Beginning:
        """`longest` of a prompt that is about to be read, and where a snapshot of it is worth taking.

        The prompt is an earlier one from then on, so call this once for each.
        """
        ends, points = self._ends.along(tokens, self._beginning(tokens))
        return Beginning(self._longest(ends, len(tokens)), self._shared(points))

    def _beginning(self, tokens: Sequence[int]) -> bytes:
        """What the hashes of this prompt begin with: where its first tokens see each other, how many."""
        return Past.beginning(min(self._model.prefix, len(tokens))).grid

    def __contains__(self, past: object) -> bool:
        """Whether a session with this Past is stored; it is not refreshed."""
        if not isinstance(past, Past):
            return False
        end = _End.of(past).hash
        return end in self._memory or (self._folder is not None and end in self._folder)

    def _longest(self, ends: Sequence[bytes], count: int) -> Session | None:
        """What is stored under the last of these hashes that has something; of a prompt of `count` tokens."""
        for end in reversed(ends):
            if (session := self._find(end)) is not None:
                self._counts["hits"] += 1
                self._counts["tokens_saved"] += session.past.count
                return session
        self._misses[self._why(count)] += 1
        return None

    def _shared(self, points: Sequence[bytes]) -> int:
        """How many tokens stand before the last of these grid points that an earlier prompt had too."""
        known = (depth for depth in range(len(points), 0, -1) if points[depth - 1] in self._points)
        shared = CHUNK * next(known, 0)
        for point in reversed(points):  # so the deepest, which fewer prompts share, is forgotten first
            self._points[point] = None
            self._points.move_to_end(point)
        while len(self._points) > self.config.points:
            self._points.popitem(last=False)
        return shared

    def _find(self, end: bytes) -> Session | None:
        """What is stored under a hash, copied to the model's device, and refreshed."""
        if (kept := self._memory.get(end)) is not None:
            self._memory.move_to_end(end)
            if self._folder is not None:
                self._folder.refresh(end)
            return _copied(kept.whole(), self._model.device)
        if self._folder is None or (session := self._folder.load(end)) is None:
            return None
        self._counts["file_hits"] += 1
        if self._fits(session):
            self._keep(session, _End.of(session.past), pin=False)
        return _copied(session, self._model.device)

    def _why(self, count: int) -> Miss:
        if not self._ends:
            return "nothing stored"
        return "shorter than a grid point" if count < CHUNK else "no stored beginning"

    # ------------------------------------------------------------------------------------------- memory

    def put(self, session: Session, *, pin: bool = False) -> None:
        """Store a copy of a session, which does not wait for a GPU.

        With a folder this may write files, of sessions that leave memory. One that cannot be written is lost,
        with a StoreWarning. A session that is larger than the limit is not kept, which `stats` counts.

        Args:
            session: what was read; one with an equal past stays instead, and is refreshed.
            pin: keep it in memory until `clear`, also one that is there already. After a restart, a pinned
                session is an entry like any other, if `flush` wrote it.

        Raises StateError if the session is not of the store's model, and PinError if it is to be pinned and
        does not fit beside those that are.
        """
        if why := misfit_of(session, self._model):
            raise StateError(f"the store cannot keep this session: {why}")
        end = _End.of(session.past)
        if (kept := self._memory.get(end.hash)) is not None:
            self._memory.move_to_end(end.hash)
            if pin and not kept.pinned:
                self._memory[end.hash] = kept._replace(pinned=True)
                self._pinned_bytes += kept.session.nbytes
        elif self._fits(session):
            self._keep(session, end, pin=pin)
        elif pin:
            raise PinError(
                f"a session of {session.nbytes:,} bytes cannot be pinned: {self._pinned_bytes:,} of the "
                f"store's {self.config.memory:,} bytes are. Give it more (StoreConfig.memory), or pin less"
            )
        else:
            self._counts["too_large"] += 1

    def _fits(self, session: Session) -> bool:
        return self._pinned_bytes + session.nbytes <= self.config.memory

    def _keep(self, session: Session, end: _End, *, pin: bool) -> None:
        """Copy a session that fits beside the pinned ones into memory."""
        nbytes = session.nbytes
        while self._nbytes + nbytes > self.config.memory:  # before it is copied: the limit holds meanwhile
            self._evict()
        self._memory[end.hash] = _Kept(*_to_host(session), pin)
        self._ends.add(end)
        self._nbytes += nbytes
        self._pinned_bytes += nbytes if pin else 0

    def _evict(self) -> None:
        """Let the least recently used session leave memory for its file."""
        end, kept = next(item for item in self._memory.items() if not item[1].pinned)
        session = kept.session
        if self._folder is not None:
            try:
                self._folder.write(kept.whole())
            except RunError as error:
                self._counts["unwritten"] += 1
                warnings.warn(f"{error} What leaves memory is lost.", StoreWarning, stacklevel=2)
        del self._memory[end]
        self._ends.remove(_End.of(session.past))
        self._nbytes -= session.nbytes
        self._counts["evictions"] += 1

    def flush(self) -> None:
        """Write what is in memory to the folder, where there is one, the least recently used first.

        Raises RunError if the folder cannot be written.
        """
        if self._folder is not None:
            for kept in self._memory.values():
                self._folder.write(kept.whole())

    def clear(self) -> None:
        """Forget all: sessions in memory, pinned ones too, this model's files, and earlier prompts."""
        for kept in self._memory.values():
            self._ends.remove(_End.of(kept.session.past))
        self._memory.clear()
        self._points.clear()
        self._nbytes = self._pinned_bytes = 0
        if self._folder is not None:
            self._folder.clear()

    def __len__(self) -> int:
        """How many sessions are stored, in memory or in files."""
        return len(self._memory.keys() | self._sizes().keys())

    @property
    def nbytes(self) -> int:
        """Bytes of the sessions in memory."""
        return self._nbytes

    def stats(self) -> StoreStats:
        """What the store holds and has done, counted now."""
        sizes, counts = self._sizes(), self._counts
        return StoreStats(
            sessions=len(self),
            pinned=sum(kept.pinned for kept in self._memory.values()),
            bytes=self._nbytes,
            files=len(sizes),
            file_bytes=sum(sizes.values()),
            hits=counts["hits"],
            file_hits=counts["file_hits"],
            misses={reason: self._misses[reason] for reason in get_args(Miss)},
            tokens_saved=counts["tokens_saved"],
            evictions=counts["evictions"],
            too_large=counts["too_large"],
            damaged=counts["damaged"],
            unwritten=counts["unwritten"],
        )

    def _sizes(self) -> dict[bytes, int]:
        """The bytes of each file."""
        return {} if self._folder is None else {end: file.nbytes for end, file in self._folder.files.items()}


class Beginning(NamedTuple):
    """What a store knows of a prompt.

    session: what has read the longest beginning of it; None if nothing has.
    shared: up to which multiple of CHUNK it agrees with an earlier prompt; 0 if with none. That is where a
        snapshot is worth taking, unless the session is there or beyond.
    """

    session: Session | None
    shared: int


class _Kept(NamedTuple):
    """A session in memory; `arrival`: after which its tensors hold what they are to, None if they do."""

    session: Session
    arrival: torch.cuda.Event | None
    pinned: bool

    def whole(self) -> Session:
        """The session, when it has come from the GPU."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.session


def _copied(session: Session, device: torch.device) -> Session:
    """A session in memory of its own, contiguous as after a file: strides may change a product's bits."""

    def copied(tensor: Tensor) -> Tensor:
        # a GPU reads page-locked memory without being waited for; the host must not read before it has come
        to_gpu = device.type == "cuda"
        return tensor.detach().to(
            device, copy=True, memory_format=torch.contiguous_format, non_blocking=to_gpu
        )

    return _mapped(session, copied)


def _to_host(session: Session) -> tuple[Session, torch.cuda.Event | None]:
    """A copy in host memory, and after which event it has arrived; None where it has.

    From a GPU a copy that stays there is made first, which takes microseconds, so that whoever gave the
    session may overwrite it at once; then a stream beside the one that computes moves that to the host.
    """
    device = session.logits_V.device
    if device.type != "cuda":
        return _copied(session, torch.device("cpu")), None
    ours, side, arrival = _copied(session, device), _beside(device), torch.cuda.Event()

    def moved(tensor: Tensor) -> Tensor:
        tensor.record_stream(side)  # or its memory would be taken for others as soon as it is let go of
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        host = _mapped(ours, moved)
        arrival.record()
    return host, arrival


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which sessions move to the host."""
    return torch.cuda.Stream(device)


def _mapped(session: Session, function: Callable[[Tensor], Tensor]) -> Session:
    """The session with a function applied to each of its tensors."""
    states = [map_state(state, function) for state in session.states]
    return Session(states, function(session.logits_V), session.past)


# ------------------------------------------------------------------------------------------------- hashes


class _End(NamedTuple):
    """Where a text ends.

    grid: the hash up to its last grid point, as in `Past`.
    length: tokens after that.
    hash: of all; at a grid point it is not the grid's hash, but the one of it and no tokens.
    """

    grid: bytes
    length: int
    hash: bytes

    @classmethod
    def of(cls, past: Past) -> _End:
        return cls(past.grid, len(past.tail), chained(past.grid, past.tail))


class _Ends:
    """Where stored sessions end: under each grid point, after how many tokens, and how many of them."""

    def __init__(self) -> None:
        self._lengths: dict[bytes, Counter[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def add(self, end: _End) -> None:
        self._lengths.setdefault(end.grid, Counter())[end.length] += 1

    def remove(self, end: _End) -> None:
        lengths = self._lengths[end.grid]
        lengths[end.length] -= 1
        if not lengths[end.length]:
            del lengths[end.length]
        if not lengths:
            del self._lengths[end.grid]

    def along(self, tokens: Sequence[int], grid: bytes = b"") -> tuple[list[bytes], list[bytes]]:
        """The hashes of all beginnings of these tokens, shortest first, that a stored session may have read;
        and 8 bytes of those at the grid points, which only say what is worth keeping.

        `grid` is that of a Past of nothing. One pass over the tokens; it hashes what `chained` hashes.
        """
        packed, size = struct.pack(f"<{len(tokens)}q", *tokens), struct.calcsize("q")
        hashes, points = list[bytes](), list[bytes]()
        for start in range(0, len(packed) + 1, CHUNK * size):
            block, at = packed[start : start + CHUNK * size], 0
            running = hashlib.blake2b(grid, digest_size=16)
            for length in sorted(self._lengths.get(grid, ())):
                if length * size > len(block):
                    break
                running.update(block[at : length * size])
                at = length * size
                hashes.append(running.copy().digest())
            running.update(block[at:])
            grid = running.digest()
            if len(block) == CHUNK * size:
                points.append(grid[:8])
        return hashes, points


# -------------------------------------------------------------------------------------------------- files


@dataclass
class _File:
    """A session's file; used: when it was last, in nanoseconds."""

    path: Path
    end: _End
    nbytes: int
    used: int


class _Folder:
    """A model's sessions in files, named by their `Past.key`, under a limit of bytes.

    Attributes:
        files: those known, by the hash of what was read; names: their hashes.
        foreign: names of files of other models, which somebody put here.
        nbytes: of the files known.
    """

    NAME = re.compile("[0-9a-f]{32}[.]safetensors")
    """Of the store's files; all others are left alone."""

    def __init__(
        self, config: StoreConfig, fingerprint: str, model: Model, ends: _Ends, counts: Counter[str]
    ) -> None:
        assert config.folder is not None
        # a model computes other states in another dtype, though its fingerprint is the same; and another
        # version of Holdall may write other files, or hash at other points
        dtypes = sorted({str(weight.dtype) for weight in model.parameters()})
        owner = f"{fingerprint} {dtypes} {STATE_FORMAT} {CHUNK}"
        name = hashlib.blake2b(owner.encode(), digest_size=8).hexdigest()
        self.path, self.limit = Path(config.folder) / name, config.disk
        self.fingerprint, self.model, self.ends, self.counts = fingerprint, model, ends, counts
        self.files: dict[bytes, _File] = {}
        self.names: dict[str, bytes] = {}
        self.foreign: set[str] = set()
        self.nbytes = 0
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            files.remove_abandoned(self.path)
            self._look()
        self._make_room(0)

    def __contains__(self, end: bytes) -> bool:
        return end in self.files

    def load(self, end: bytes) -> Session | None:
        """The session with this hash; None if it has no file, or none that can be read."""
        if (file := self.files.get(end)) is None:
            return None
        try:
            session = load_session(file.path, self.model, fingerprint=self.fingerprint)
            if why := misfit_of(session, self.model):
                raise StateError(why)
            if _End.of(session.past) != file.end:
                raise StateError("it has read other tokens")
        except (RunError, ValueError, KeyError, TypeError) as error:
            self._forget(end)
            self._remove_if_damaged(file.path, error)
            return None
        self.refresh(end)
        return session

    def write(self, session: Session) -> None:
        """Write a session, unless its file is there, which is then refreshed; one beyond the limit is not.

        Raises RunError if the folder cannot be written.
        """
        end, path = _End.of(session.past), self.path / f"{session.past.key}.safetensors"
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it to free the disk
            self._look()
            if end.hash in self.files:
                self.refresh(end.hash)
                return
            if path.name in self.foreign:
                raise RunError(f"{path.name} is of another model")
            if 0 < self.limit < session.nbytes:
                self.counts["too_large"] += 1
                return
            self._make_room(session.nbytes)
            save_session(session, path, model=self.fingerprint)
            self._add(path, end)
        self._make_room(0)  # the header counts too

    def refresh(self, end: bytes) -> None:
        """Mark a session's file, if there is one, as used now."""
        if (file := self.files.get(end)) is not None:
            file.used = time.time_ns()
            with contextlib.suppress(OSError):  # another process has removed it
                os.utime(file.path, ns=(file.used, file.used))

    def clear(self) -> None:
        """Remove this model's files. Raises RunError if that fails."""
        with self._explained():
            self._look()
            for end, file in list(self.files.items()):
                file.path.unlink(missing_ok=True)
                self._forget(end)

    def _look(self) -> None:
        """Bring `files` up to date with the folder, which other processes may have changed.

        The names alone are listed: a file that is known is not asked for anything, so that ten thousand cost
        little beside the one that is written.
        """
        there = set(os.listdir(self.path))
        for name in self.names.keys() - there:
            self._forget(self.names[name])
        for name in sorted(there - self.names.keys() - self.foreign):
            if self.NAME.fullmatch(name):
                self._examine(self.path / name)

    def _examine(self, path: Path) -> None:
        """Make a file that was not known before an entry, by its header alone."""
        try:
            described = describe_states(path)
            if described.model != self.fingerprint:
                self.foreign.add(path.name)
                return
            past = json.loads(described.about["past"])
            known = Past(past["count"], bytes.fromhex(past["grid"]), tuple(past["tail"]))
            if known.key != path.stem or known.count % CHUNK != len(known.tail):
                raise StateError("its name is not that of what was read")
        except (RunError, ValueError, KeyError, TypeError, struct.error) as error:
            self._remove_if_damaged(path, error)
        else:
            self._add(path, _End.of(known))

    def _remove_if_damaged(self, path: Path, error: Exception) -> None:
        """Remove a file that is wrong inside; one that cannot be read now, or is gone, may be right."""
        if not isinstance(error.__cause__, OSError):
            self.counts["damaged"] += 1
            with contextlib.suppress(OSError):
                path.unlink()

    def _make_room(self, nbytes: int) -> None:
        """Remove the files that were used longest ago until so many more bytes fit the limit."""
        while self.limit and self.files and self.nbytes + nbytes > self.limit:
            file = min(self.files.values(), key=lambda file: file.used)
            with contextlib.suppress(OSError):  # another process has removed it
                if (used := file.path.stat().st_mtime_ns) > file.used:
                    file.used = used  # by another process, since this one looked
                    continue
                file.path.unlink()
            self._forget(file.end.hash)

    def _add(self, path: Path, end: _End) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            about = path.stat()
            self.files[end.hash] = _File(path, end, about.st_size, about.st_mtime_ns)
            self.names[path.name] = end.hash
            self.ends.add(end)
            self.nbytes += about.st_size

    def _forget(self, end: bytes) -> None:
        file = self.files.pop(end)
        del self.names[file.path.name]
        self.ends.remove(file.end)
        self.nbytes -= file.nbytes

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an OSError, also one that a RunError was made of, what a user of the store can do."""
        try:
            yield
        except (OSError, RunError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = getattr(cause, "strerror", None) or error
            raise RunError(
                f"the store cannot write to {self.path}: {reason}. Free some space or make the folder "
                "writable, or choose another (StoreConfig.folder)."
            ) from error
