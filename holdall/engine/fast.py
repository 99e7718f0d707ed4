"""The engine: many texts at once, each as if it were alone.

    engine = Engine(model, tokenizer, EngineConfig(rows=64))
    ticket = engine.submit(Request(prompt=ids))
    while engine.busy:
        for piece in engine.step(): ...

Texts that are being written are the first rows of fixed buffers, one buffer for each tensor of the states. A
step of the first 1, 2, 4, 8, ... rows runs on views of them and draws each row's next token; on a GPU it is
recorded once as a CUDA graph for each number of rows, and replayed. So no mixer knows of an engine: its state
is written in place, at addresses that stay. When a text ends, the last row moves into its place.

Prompts are read beside, one piece of the grid of holdall/engine/session.py at a time, so that a long prompt
never holds up the texts by more than a piece; the row that comes of it is copied into the buffers. Small
pieces of one size are read together: a call of the model costs as much as a hundred tokens.

A step is launched before the tokens of the last one are looked at, so that the device does not wait for the
host: a text's last token is read once more than it needs to be, which is what `Request.keep` gives back.

With `drafts` = K a step reads each row's last token and K guesses of what follows, draws after each of them,
and keeps those draws up to the first that was not guessed: 1 to K + 1 tokens. The states take back what was
guessed wrong, all on the device. As in holdall/engine/drafts.py the text is the one without drafts.

Rows do not see each other, but the products of a step may add in another order for another number of rows.
`EngineConfig.fixed` runs every step on all rows, and reads prompts one by one: a text is then the same bit
for bit, whatever runs beside it.

Letters: B rows, T tokens that a step reads of each row, V vocabulary, K the likeliest tokens, or guesses.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from holdall.contract import State, bytes_per_row, is_reserved, trim
from holdall.contract.config import Config
from holdall.engine import lookup, sampling
from holdall.engine.graphs import Desk, DeskReader, record
from holdall.engine.request import Finish, Piece, QueueFullError, Request, Sampling, Token, Usage
from holdall.engine.sampling import Occurrences, Settings
from holdall.engine.session import CHUNK, Past, Reader, Session, step_together
from holdall.engine.slow import PromptReader, checked, numbered, occurrences_of
from holdall.engine.store import StateStore
from holdall.engine.text import Writer
from holdall.model import Model
from holdall.ops.begun import begun
from holdall.ops.kept import Unchanging
from holdall.settings import PositiveInt, Range
from holdall.text.tokenizers import Tokenizer

TOP = 20
"""Most alternatives whose log-probabilities can be asked for."""
NOT_REACHED = -2
"""Stands for the draws of a step that come after one that was not guessed."""
TOGETHER = 8
"""Most prompts of which a piece is read in one call of the model."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    """How an engine runs."""

    rows: PositiveInt = 64
    """The most texts that are written at the same time."""
    chunk: PositiveInt = CHUNK
    """Tokens of the largest piece of a prompt, a power of two; so many are read in each step at most."""
    max_context: PositiveInt | None = None
    """Tokens that a row may read and write, reserved for models whose states grow; others need no limit."""
    queue: PositiveInt = 1024
    """The most requests that wait; more are refused."""
    fixed: bool = False
    """Whether every step runs on all rows and prompts are read one by one, so that a text's bits do not
    depend on what runs beside it."""
    graphs: Literal["auto", "off"] = "auto"
    """"auto" records steps as CUDA graphs on a GPU."""
    drafts: Annotated[int, Range(least=1, zero="none")] = 0
    """Tokens guessed and read beside each row's last one, K, from n-grams of its last 1024 tokens. The model
    has to take back 2 K + 1 of them (docs/replay.md): what was guessed wrong, and what was read beyond a
    text's end before the host saw it. Where `max_context` is reserved, 2 K tokens more are.
    """

    def validate(self) -> None:
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk is a power of two, not {self.chunk}")


class Stats(NamedTuple):
    """What an engine is doing.

    running, reading, waiting: texts that are being written, prompts that are being read, requests that wait.
    row_bytes: of the states of one row; state_bytes: of all rows' buffers.
    steps, prompt_tokens, cached_tokens, read_tokens, tokens: since it was made; of the prompts' tokens,
        cached ones are not read again, and read ones have been read by now.
    drafted, accepted: tokens that were guessed for texts, and those of them that became tokens of a text.
    """

    running: int
    reading: int
    waiting: int
    rows: int
    row_bytes: int
    state_bytes: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    read_tokens: int
    tokens: int
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Runs requests for one model, whose weights stay as they are. One thread calls it; nothing happens but
    in `step`."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        store: StateStore | None = None,
    ) -> None:
        """Raises ValueError if the model's states grow and no `max_context` says how far, if the model
        cannot take back as many tokens as drafts need, or cannot read a text in pieces.
        """
        _ = model.prefix  # raises
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.config = config or EngineConfig()
        limit = self.config.max_context
        needs_room = model.needs_room
        if needs_room and limit is None:
            raise ValueError(
                "the model's states grow with the text: say by max_context how many tokens a row may have"
            )
        drafts = self.config.drafts
        check_drafts(model, drafts, limit)
        self.capacity = None if limit is None or not needs_room else limit + 2 * drafts
        self.buffers = _Buffers(model, tokenizer.vocab, self.config, self.capacity)
        self.desk = (
            Desk(model, self.buffers.weights) if self.buffers.recorded and self.capacity is None else None
        )
        self._rows: list[_Row] = []
        self._ready: deque[tuple[_Row, Session]] = deque()
        self._waiting: deque[_Job] = deque()
        self._reading: deque[_Job] = deque()
        self._flying: deque[_Flight] = deque()
        self._jobs: dict[int, _Job] = {}
        self._tickets = itertools.count(1)
        self._steps = self._prompt_tokens = self._cached_tokens = self._read_tokens = self._tokens = 0
        self._drafted = self._accepted = 0

    # ---------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> int:
        """Take a request; returns its ticket, which its pieces bear.

        Raises QueueFullError if as many wait as may, and ValueError, naming the field, if it cannot be done.
        """
        checked(request, self.model, self.tokenizer)
        before = 0 if request.session is None else request.session.past.count
        total, limit = before + len(request.prompt) + request.sampling.max_tokens, self.config.max_context
        if limit is not None and total > limit:
            raise ValueError(
                f"prompt and max_tokens are {total} tokens together, more than max_context {limit}"
            )
        if len(self._waiting) >= self.config.queue:
            raise QueueFullError(f"{len(self._waiting)} requests wait, and no more may")
        job = _Job(next(self._tickets), request, before)
        self._jobs[job.ticket] = job
        self._waiting.append(job)
        return job.ticket

    def cancel(self, ticket: int) -> None:
        """End a request, if it has not ended: the next step gives its last pieces, and frees its rows."""
        if ticket in self._jobs:
            self._jobs[ticket].cancelled = True

    @torch.no_grad()
    def warm_up(self) -> int:
        """On a GPU: record the graphs of all sizes, that no request waits for them; returns how many.

        Those of steps that draw with or without noise, and of the pieces of prompts. What else may be asked
        for, filters or penalties say, is recorded when it first is.
        """
        if not self.buffers.recorded:
            return 0
        sizes = sorted({self.buffers.size_of(live) for live in range(1, self.config.rows + 1)})
        plain = _Kind(noise=False, filters=False, occurrences=False, logprobs=False)
        for size, kind in itertools.product(sizes, (plain, plain._replace(noise=True))):
            self.buffers.record(size, kind)
        if self.desk is None:
            return len(self.buffers.graphs)
        for power in range(self.config.chunk.bit_length()):
            self.desk.record(1 << power)
        return len(self.buffers.graphs) + len(self.desk.graphs)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._jobs)

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Submit requests, as many as may wait at a time, and give their pieces until all have ended."""
        requests = iter(requests)
        for request in requests:
            while len(self._waiting) >= self.config.queue:
                yield from self.step()
            self.submit(request)
        while self.busy:
            yield from self.step()

    def stats(self) -> Stats:
        return Stats(
            len(self._rows), len(self._reading) + len(self._ready), len(self._waiting), self.config.rows,
            self.buffers.row_bytes, self.buffers.row_bytes * self.buffers.rows, self._steps,
            self._prompt_tokens, self._cached_tokens, self._read_tokens, self._tokens, self._drafted,
            self._accepted,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """One step of all texts, and at most one chunk of prompts; gives what is new."""
        self._steps += 1
        given = self._cancelled()
        landed = list(self._flying)
        self._flying.clear()
        if self._rows:
            self._flying.append(self.buffers.launch(self._rows))
        for flight in landed:
            given += self._landed(flight)
        self._admit()
        given += self._read()
        self._place()
        return given

    def _landed(self, flight: _Flight) -> list[Piece]:
        """What a step that was launched before has drawn."""
        given, drawn = [], flight.tokens()
        for row, (found, guessed) in zip(flight.rows, drawn, strict=True):
            if row.ended:  # it had, and was launched once more
                continue
            text, tokens = "", list[Token]()
            finish: Finish = ""
            for token in found:
                if token.id < 0:
                    finish = "error"
                    break
                row.text.append(token.id)
                tokens.append(token)
                more, finish = row.writer.add(token.id)
                text += more
                if finish:
                    break
            self._tokens += len(tokens)
            self._drafted += guessed
            self._accepted += min(len(tokens), len(found) - 1)
            session = self._end(row) if finish else None
            given.append(row.piece(text, tuple(tokens), finish, session))
            if finish:
                self._leave(row.job)
        return given

    def _end(self, row: _Row) -> Session | None:
        """Free the row of a text that has ended; what was read, if that was asked for."""
        at, kept = self._rows.index(row), row.job.request.keep
        session = None
        if kept or self.store is not None:
            # the step that is in flight reads the last token
            session = self.buffers.take(at, row.past, row.text)
            if self.store is not None and session.logits_V.isfinite().all():
                self.store.put(session)
        self._free(row)
        return session if kept else None

    def _free(self, row: _Row) -> None:
        """The last row takes the place of one that has ended."""
        row.ended, at, last = True, self._rows.index(row), self._rows.pop()
        if last is not row:
            self.buffers.move(len(self._rows), at)
            self._rows[at] = last

    def _cancelled(self) -> list[Piece]:
        """Take cancelled requests out, wherever they are."""
        given = []
        for job in [job for job in self._jobs.values() if job.cancelled]:
            for row in [row for row in self._rows if row.job is job]:
                session = None
                if job.request.keep:  # what was drawn and not looked at yet is dropped: it was not read
                    session = self.buffers.take(self._rows.index(row), row.past, row.text)
                self._free(row)
                given.append(row.piece(row.writer.rest(), (), "cancelled", session))
            waiting = [row for row, _ in self._ready if row.job is job]
            self._ready = deque((row, session) for row, session in self._ready if row.job is not job)
            for queue in (self._waiting, self._reading):
                with contextlib.suppress(ValueError):
                    queue.remove(job)
                    waiting = [_Row(job, index, self.tokenizer, Past()) for index in range(job.request.n)]
            given += [row.piece("", (), "cancelled", None) for row in waiting]
            del self._jobs[job.ticket]
        return given

    def _leave(self, job: _Job) -> None:
        """One of a request's texts has ended."""
        job.left -= 1
        if not job.left:
            del self._jobs[job.ticket]

    # ---------------------------------------------------------------------------------------------- prompts

    def _admit(self) -> None:
        """Begin to read the prompts of requests for whose texts there are rows."""
        taken = len(self._rows) + len(self._ready) + sum(job.request.n for job in self._reading)
        while self._waiting and (taken < self.config.rows):
            job = self._waiting.popleft()
            self._begin(job)
            self._reading.append(job)
            taken += job.request.n

    def _begin(self, job: _Job) -> None:
        job.admitted = time.perf_counter()
        request, start = job.request, job.request.session
        done, marks = 0, list(request.marks)
        if self.store is not None and start is None and request.prompt_logprobs is None:
            start, shared = self.store.resume(request.prompt)
            done = 0 if start is None else start.past.count
            marks.append(shared)
        job.cached = job.before + done
        job.marks = {mark - done for mark in marks if mark > done}
        start = None if start is None else start.to(self.model.device)
        rest, cuts = request.prompt[done:], _Cuts(chunk=self.config.chunk, marks=sorted(job.marks))
        if self.desk is not None and request.prompt_logprobs is None:
            job.reader = DeskReader(self.desk, rest, start, **cuts)
        else:
            job.reader = PromptReader(self.model, rest, start, logprobs=request.prompt_logprobs, **cuts)
        self._cached_tokens += job.cached
        self._prompt_tokens += len(request.prompt)

    def _read(self) -> list[Piece]:
        """Read a chunk of the prompts, the oldest first; those that end become rows."""
        given, left = self._read_whole(), self.config.chunk
        while self._reading:
            oldest = _reader(self._reading[0])
            size = oldest.sizes[-1]
            if left < min(size, self.config.chunk):  # a prefix may be longer than a chunk
                break
            most = 1 if self.config.fixed else max(1, min(TOGETHER, left // size))
            alike = (job for job in self._reading if oldest.alike(_reader(job)))
            group = list(itertools.islice(alike, most))
            step_together([_reader(job) for job in group])
            left -= size * len(group)
            self._read_tokens += size * len(group)
            for job in group:
                reader = _reader(job)
                if self.store is not None and reader.at in job.marks and not reader.done:
                    self.store.put(reader.session())
            given += self._read_whole()
        return given

    def _read_whole(self) -> list[Piece]:
        """Take out the prompts that have been read, whose texts are then ready to be written."""
        ended = [job for job in self._reading if _reader(job).done]
        for job in ended:
            self._reading.remove(job)
        return [piece for job in ended for piece in self._write(job)]

    def _write(self, job: _Job) -> list[Piece]:
        """A prompt was read: its texts are ready to be written."""
        reader, given = _reader(job), list[Piece]()
        session = reader.session()
        if self.store is not None:
            self.store.put(session)
        for index in range(job.request.n):
            row = _Row(job, index, self.tokenizer, session.past)
            if row.sampling.max_tokens == 0:
                given.append(row.piece("", (), "length", session if job.request.keep else None))
                self._leave(job)
            else:
                self._ready.append((row, session))
        job.reader = job.reader if job.prompt else None
        return given

    def _place(self) -> None:
        """Copy what is ready into free rows, and draw each one's first token."""
        while self._ready and len(self._rows) < self.config.rows:
            row, session = self._ready.popleft()
            self._rows.append(row)
            self._flying.append(self.buffers.put(len(self._rows) - 1, row, session))


class _Cuts(TypedDict):
    """Where a prompt is cut."""

    chunk: int
    marks: Sequence[int]


@dataclass(eq=False)
class _Job:
    """A request on its way.

    before: tokens of its session; cached: tokens that need not be read.
    admitted: when its prompt began to be read, by time.perf_counter; NaN before.
    """

    ticket: int
    request: Request
    before: int
    cached: int = 0
    marks: set[int] = field(default_factory=set)
    reader: Reader | None = None
    cancelled: bool = False
    left: int = 0
    admitted: float = float("nan")

    def __post_init__(self) -> None:
        self.left = self.request.n

    @property
    def prompt(self) -> tuple[Token, ...]:
        """The prompt's tokens, where their log-probabilities were asked for."""
        return tuple(self.reader.tokens) if isinstance(self.reader, PromptReader) else ()


def _reader(job: _Job) -> Reader:
    """What reads the prompt of a job that has begun."""
    assert job.reader is not None
    return job.reader


class _Row:
    """A text that is being written."""

    def __init__(self, job: _Job, index: int, tokenizer: Tokenizer, past: Past) -> None:
        self.job, self.index, self.past = job, index, past
        self.sampling: Sampling = numbered(job.request.sampling, index)
        self.writer = Writer(tokenizer, past.recent, self.sampling)
        self.text: list[int] = []
        self.ended = self.shown = False

    def piece(self, text: str, tokens: tuple[Token, ...], finish: Finish, session: Session | None) -> Piece:
        job = self.job
        prompt = job.prompt if not self.shown and self.index == 0 else ()
        self.shown = True
        usage = Usage(job.before + len(job.request.prompt), job.cached, len(self.text))
        return Piece(
            ticket=job.ticket, index=self.index, text=text, tokens=tokens, finish=finish, usage=usage,
            prompt=prompt, session=session, admitted=job.admitted,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the device


class _Drawn(NamedTuple):
    """What a step gives, on its way to the host: tokens, and what else was asked for.

    token_BT: NOT_REACHED behind the first that was not guessed.
    logprob_BT, id_BTK, best_BTK: with log-probabilities.
    guessed_B: with drafts, whether there were any for a row.
    """

    token_BT: Tensor
    logprob_BT: Tensor | None = None
    id_BTK: Tensor | None = None
    best_BTK: Tensor | None = None
    guessed_B: Tensor | None = None


class _Kind(NamedTuple):
    """What a step has to do beside reading and drawing; one graph for each kind and number of rows."""

    noise: bool
    filters: bool
    occurrences: bool
    logprobs: bool


class _Flight:
    """A step that was launched, and the rows that it was launched for."""

    def __init__(self, rows: Sequence[_Row], drawn: _Drawn) -> None:
        self.rows, self.event = list(rows), None
        if drawn.token_BT.device.type == "cuda":
            self.drawn, self.event = _Drawn(*map(_to_host, drawn)), torch.cuda.Event()  # type: ignore[arg-type]
            self.event.record()
        else:
            self.drawn = drawn

    def tokens(self) -> list[tuple[list[Token], int]]:
        """The tokens of each row, and how many were guessed for it; waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        ids, own, top_ids, best, guessed = (None if t is None else t.tolist() for t in self.drawn)
        assert ids is not None
        given = []
        for at, row in enumerate(self.rows):
            most, found = row.sampling.logprobs, list[Token]()
            for t, token in enumerate(itertools.takewhile(lambda token: token != NOT_REACHED, ids[at])):
                if most is None or own is None or top_ids is None or best is None or token < 0:
                    found.append(Token(token))
                    continue
                top = zip(top_ids[at][t][:most], best[at][t][:most], strict=True)
                found.append(Token(token, own[at][t], tuple(top)))
            given.append((found, 0 if guessed is None or not guessed[at] else len(ids[at]) - 1))
        return given


def _to_host(tensor: Tensor | None) -> Tensor | None:
    """A copy that is on its way, which only pinned memory does not wait for."""
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _described(token_B: Tensor, logits_BV: Tensor | None) -> _Drawn:
    """What was drawn at one position, with log-probabilities where there are logits."""
    if logits_BV is None:
        return _Drawn(token_B)
    logprob_BV = logits_BV.log_softmax(-1)
    best_BK, id_BK = logprob_BV.topk(min(TOP, logprob_BV.shape[-1]), dim=-1)
    own_B = logprob_BV.gather(-1, token_B.clamp(min=0)[:, None])[:, 0]
    return _Drawn(token_B, own_B, id_BK, best_BK)


def _beside(column: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors of several positions as one, position second."""
    tensors = [tensor for tensor in column if tensor is not None]
    if len(tensors) < 2:
        return tensors[0][:, None] if tensors else None
    return torch.stack(tensors, dim=1)


def check_drafts(model: Model, drafts: int, max_context: int | None) -> None:
    """Refuse with ValueError what a model cannot take back, or has no learned positions for."""
    if not drafts:
        return
    needed, positions = 2 * drafts + 1, model.config.positions
    for depth, mixer in enumerate(model.mixers):
        if mixer.rollback_limit < needed:
            raise ValueError(
                f"drafts = {drafts} need a model that takes back {needed} tokens, and layer {depth}, "
                f"{mixer.owner}, takes back {mixer.rollback_limit}: load it with replay, "
                f"model.with_replay({needed}) or holdall serve --replay {needed}, or take fewer drafts"
            )
    if positions and max_context is not None and max_context + 2 * drafts > positions:
        raise ValueError(
            f"max_context {max_context} and twice drafts = {drafts} are more than the model's {positions} "
            f"positions: lower max_context to {positions - 2 * drafts}"
        )


class _Buffers:
    """The rows' states and settings, in tensors that stay where they are."""

    def __init__(self, model: Model, vocab: int, config: EngineConfig, capacity: int | None) -> None:
        self.model, self.vocab, self.config, self.capacity = model, vocab, config, capacity
        self.rows, device, self.weights = config.rows, model.device, Unchanging()
        self.device = device
        self.states: list[State] = model.init_states(self.rows, capacity=capacity)
        self.row_bytes = sum(map(bytes_per_row, self.states))
        self.settings = sampling.settings_of([Sampling(seed=0)] * self.rows, device)
        self.next_B = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.position_B = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.logits_BV = torch.zeros(self.rows, model.config.vocab, device=device)
        recalled = lookup.RECALLED if config.drafts else 0
        self.recent_BR = torch.full((self.rows, recalled), lookup.NOTHING, dtype=torch.long, device=device)
        self.occurrences: Occurrences | None = None
        self.graphs: dict[tuple[int, _Kind], tuple[torch.cuda.CUDAGraph, _Drawn]] = {}
        self.recorded = device.type == "cuda" and config.graphs == "auto"
        self.pool: Any = None

    # ------------------------------------------------------------------------------------------------ rows

    def put(self, at: int, row: _Row, session: Session) -> _Flight:
        """Copy a session into a row and draw its first token."""
        states = session.states
        if self.capacity is not None:
            states = self.model.with_room(states, self.capacity)
        for buffer, state in zip(self.states, states, strict=True):
            for ours, given in zip(buffer, state, strict=True):
                ours[at].copy_(given[0])
        for ours, given in zip(self.settings, sampling.settings_of([row.sampling]), strict=True):
            ours[at].copy_(given[0], non_blocking=True)
        self.logits_BV[at].copy_(session.logits_V)
        self.position_B[at] = session.past.count
        own = occurrences_of(row.sampling, self.vocab, row.job.request.prompt, (), self.device)
        if own is not None and self.occurrences is None:
            self.occurrences = Occurrences(*(t.expand(self.rows, -1).clone().zero_() for t in own))
        if self.occurrences is not None:
            for i, ours in enumerate(self.occurrences):
                ours[at].zero_() if own is None else ours[at].copy_(own[i][0])
        if self.config.drafts:
            # both end what was read, but the prompt may be shorter, or longer, than what follows the grid
            known = max(row.job.request.prompt, session.past.tail, key=len)[-lookup.RECALLED :]
            self.recent_BR[at].fill_(lookup.NOTHING)
            self.recent_BR[at, lookup.RECALLED - len(known) :] = torch.tensor(known, device=self.device)
        drawn, _ = self._draw(slice(at, at + 1), self._kind([row]), self.logits_BV[at : at + 1, None])
        return _Flight([row], drawn)

    def move(self, source: int, to: int) -> None:
        """Copy one row over another."""
        for tensor in (*self._written(), *self.settings):
            tensor[to].copy_(tensor[source])

    def take(self, at: int, before: Past, text: Sequence[int]) -> Session:
        """A copy of a row as a session that has read what was before a text, and the text."""
        states = [type(state)(*(tensor[at : at + 1].clone() for tensor in state)) for state in self.states]
        past, logits_V = before.after(text), self.logits_BV[at].clone()
        if self.config.drafts:
            # it may have read more, and the logits behind the text are gone: its last token is read again
            ahead_1 = self.position_B[at : at + 1] - past.count
            states = self.model.rollback(states, ahead_1 + bool(text), inplace=True)
            if text:
                last_11 = torch.tensor([text[-1:]], device=self.device)
                h_11D, after = self.model.hidden(last_11, states, inplace=True)
                assert after is not None
                states, logits_V = after, self.model.logits(h_11D[0, -1]).float()
        return Session([trim(state) for state in states], logits_V, past)

    def _written(self) -> list[Tensor]:
        """What steps write of each row."""
        tensors = [*itertools.chain(*self.states), *(self.occurrences or ())]
        return [*tensors, self.next_B, self.position_B, self.logits_BV, self.recent_BR]

    # ------------------------------------------------------------------------------------------------ a step

    def launch(self, rows: Sequence[_Row]) -> _Flight:
        """Read each row's last token and draw the next, or several, without waiting for the device."""
        size, kind = self.size_of(len(rows)), self._kind(rows)
        if self.capacity is not None and size > len(rows):
            for state in self.states:  # or rows that nobody has would fill up
                if is_reserved(state):
                    state.filled_B[len(rows) : size] = 0
        if not self.recorded:
            return _Flight(rows, self._step(size, kind))
        self.record(size, kind)
        graph, drawn = self.graphs[size, kind]
        graph.replay()
        return _Flight(rows, drawn)

    def size_of(self, live: int) -> int:
        """How many rows a step runs on, for so many texts: a power of two, or half as many more."""
        if self.config.fixed:
            return self.rows
        power = 1 << (live - 1).bit_length()
        size = 3 * power // 4 if live <= 3 * power // 4 and power >= 32 else power
        return min(size, self.rows)

    def _step(self, size: int, kind: _Kind) -> _Drawn:
        some, drafts = slice(0, size), self.config.drafts
        views = [type(state)(*(tensor[some] for tensor in state)) for state in self.states]
        given_BT, guess_BK = self.next_B[some, None], None
        if drafts:
            guess_BK = lookup.guesses(self.recent_BR[some], drafts)
            given_BT = torch.cat((given_BT, guess_BK.clamp(min=0)), dim=1)
        with self.weights, begun():
            h_BTD, after = self.model.hidden(given_BT, views, inplace=True)
            logits_BTV = self.model.logits(h_BTD.flatten(0, 1)).float().unflatten(0, given_BT.shape)
        assert after is not None
        self.position_B[some] += 1
        drawn, count_B = self._draw(some, kind, logits_BTV, guess_BK)
        if count_B is None:
            self.logits_BV[some] = logits_BTV[:, 0]
            return drawn
        self.model.rollback(after, drafts + 1 - count_B, inplace=True)
        self.position_B[some] += count_B - 1
        return drawn

    def _draw(
        self, some: slice, kind: _Kind, logits_BTV: Tensor, guess_BK: Tensor | None = None
    ) -> tuple[_Drawn, Tensor | None]:
        """What some rows draw after each token that was read, as long as the one behind it was guessed right.

        Returns that, and where there are guesses how many tokens each row has drawn, (B,).
        """
        occurrences, reached_B, steps = None, None, list[_Drawn]()
        if kind.occurrences:
            assert self.occurrences is not None
            occurrences = Occurrences(*(tensor[some] for tensor in self.occurrences))
        chosen, position_B = Settings(*(t[some] for t in self.settings)), self.position_B[some]
        for t, logits_BV in enumerate(logits_BTV.unbind(1)):
            if t:
                assert guess_BK is not None
                token_B = steps[-1].token_BT
                reached_B = (token_B == guess_BK[:, t - 1]) & (token_B >= 0)
                position_B = position_B + 1
            token_B = sampling.draw(
                logits_BV[:, : self.vocab], position_B, chosen,
                noise=kind.noise, filters=kind.filters, occurrences=occurrences,
            )  # fmt: skip
            known_B = token_B.clamp(min=0)
            if occurrences is not None:
                one_B = torch.ones_like(known_B, dtype=torch.int32) if reached_B is None else reached_B.int()
                occurrences.count_BV.scatter_add_(1, known_B[:, None], one_B[:, None])
            if reached_B is not None:
                token_B = token_B.masked_fill(~reached_B, NOT_REACHED)
                known_B = torch.where(reached_B, known_B, self.next_B[some])
            self.next_B[some] = known_B
            steps.append(_described(token_B, logits_BV if kind.logprobs else None))
        drawn = _Drawn(*map(_beside, zip(*steps, strict=True)))  # type: ignore[arg-type]
        if not self.config.drafts:
            return drawn, None
        count_B = (drawn.token_BT != NOT_REACHED).sum(1)
        self.recent_BR[some] = lookup.remembered(self.recent_BR[some], drawn.token_BT, count_B)
        if guess_BK is None:
            return drawn, None
        return drawn._replace(guessed_B=guess_BK[:, 0] != lookup.NOTHING), count_B

    def _kind(self, rows: Sequence[_Row]) -> _Kind:
        return _Kind(
            any(row.sampling.temperature > 0 for row in rows),
            any(sampling.needs_filters(row.sampling) for row in rows),
            any(sampling.needs_occurrences(row.sampling) for row in rows),
            any(row.sampling.logprobs is not None for row in rows),
        )

    def record(self, size: int, kind: _Kind) -> None:
        """Record a step as a graph, if it was not; the rows that warming it up writes into are put back."""
        if (size, kind) in self.graphs:
            return
        written = [tensor[:size] for tensor in self._written()]
        graph, drawn = record(lambda: self._step(size, kind), written, pool=self.pool)
        self.pool = graph.pool()
        self.graphs[size, kind] = (graph, drawn)
