"""Records to tokens in many processes: batches go out, and come back in order."""

from __future__ import annotations

import concurrent.futures
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from holdall import files, processes
from holdall.text import tokenizers
from holdall.text.corpus import SPLITS
from holdall.text.files import TextError
from holdall.text.sources import BadRecord, Record, Source, decode, draw, is_blank, new_draw, parse
from holdall.text.tokenizers import Tokenizer

BATCH_BYTES = 1 << 20
"""Of records that a worker gets at once."""


@dataclass(frozen=True)
class Job:
    """What a worker must know."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    valid: float
    text_field: str
    separator: str

    def plan(self) -> dict[str, Any]:
        """All that decides what comes out, as plain JSON values."""
        sources = [
            {
                "path": files.encodable(str(each.path)),
                "bytes": each.size,
                "modified": each.modified,
                "valid": each.valid,
            }
            for each in self.sources
        ]
        return {
            "sources": sources,
            "tokenizer": self.tokenizer.describe(),
            "valid": self.valid,
            "text_field": files.encodable(self.text_field),
            "separator": files.encodable(self.separator),
        }


class Bad(NamedTuple):
    """A record that was left out."""

    reason: str
    told: str
    """Where it is, and what was found."""


@dataclass
class Split:
    """Documents of one split, tokens end to end."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    about: list[bytes] = field(default_factory=list)

    def add(self, tokens: list[np.ndarray], about: bytes, tokenizer: Tokenizer) -> None:
        """Take a document; its end of text comes behind it."""
        self.tokens += [*tokens, np.array([tokenizer.end], dtype=tokenizer.dtype)]
        self.lengths.append(sum(map(len, tokens)) + 1)
        self.about.append(about)

    def extend(self, other: Split) -> None:
        self.tokens += other.tokens
        self.lengths += other.lengths
        self.about += other.about


class Piece(NamedTuple):
    """What became of a piece of a document that is longer than a batch.

    place: with the last piece, that of the document.
    """

    tokens: np.ndarray
    is_blank: bool
    place: Place | None


class Place(NamedTuple):
    """Where a document goes: the index of its split, the line of what is known of it, and the share for
    validation above which it would be in that."""

    split: int
    about: bytes
    least: float


class Encoded(NamedTuple):
    """What became of a batch of records, or of a part of one: see `in_batches`.

    last: file and number of the last record. ends: so does its batch. piece: of a document, if it is no more.
    least: the smallest share that would have taken a document for validation.
    undivided: files in which the separator is nowhere.
    """

    last: tuple[int, int]
    ends: bool
    splits: tuple[Split, Split]
    bad: list[Bad]
    least: float
    undivided: list[str]
    piece: Piece | None = None


class Batch(NamedTuple):
    """Whole records, or one piece of a long one. ends: whether a part may end behind it."""

    records: list[Record]
    ends: bool


MANY = 1 << 23
"""Tokens that are not copied into one array."""


def encode(job: Job, batch: Batch) -> Encoded:
    last = batch.records[-1]
    undivided = [
        files.encodable(str(job.sources[each.file].path)) for each in batch.records if each.undivided
    ]
    out = Encoded((last.file, last.number), batch.ends, (Split(), Split()), [], 1.0, undivided)
    if not last.is_whole:
        return _encode_piece(job, last, out)
    texts: list[str] = []
    places: list[Place] = []
    for record in batch.records:
        is_json = job.sources[record.file].is_json
        try:
            document = parse(record.data, is_json=is_json, text_field=job.text_field)
        except BadRecord as error:
            out.bad.append(_bad(job, (record.file, record.number), error))
            continue
        hashed = new_draw()
        hashed.update(document.text.encode())
        places.append(_place(job, record, document.about, draw(hashed)))
        texts.append(document.text)
    for ids, place in zip(job.tokenizer.encode_batch(texts), places, strict=True):
        out.splits[place.split].add([ids], place.about, job.tokenizer)
    for each in out.splits:  # one array travels between processes sooner than many small ones
        if len(each.tokens) > 1 and sum(each.lengths) < MANY:
            each.tokens = [np.concatenate(each.tokens)]
    return out._replace(least=min([1.0, *(place.least for place in places)]))


def _encode_piece(job: Job, record: Record, out: Encoded) -> Encoded:
    place = _place(job, record, {}, record.drawn) if record.ends else None
    try:
        text = decode(record.data, record.start)
    except BadRecord as error:
        out.bad.append(_bad(job, out.last, error))
        text = ""
    (ids,) = job.tokenizer.encode_batch([text])
    return out._replace(piece=Piece(ids, is_blank(text), place))


def _number(job: Job, last: tuple[int, int]) -> str:
    """The number of a record behind the name of its file, which may hold others."""
    return f":{last[1]}" if job.sources[last[0]].is_json or job.separator else ""


def _bad(job: Job, last: tuple[int, int], error: BadRecord) -> Bad:
    found = f"{error}, {error.detail}" if error.detail else str(error)
    return Bad(str(error), f"{files.encodable(str(job.sources[last[0]].path))}{_number(job, last)}: {found}")


def _place(job: Job, record: Record, about: dict[str, str], drawn: float) -> Place:
    source = job.sources[record.file]
    where = files.encodable(source.path.name) + _number(job, (record.file, record.number))
    line = json.dumps({**about, "source": where}).encode() + b"\n"
    if source.valid:
        return Place(SPLITS.index("valid"), line, 1.0)
    return Place(SPLITS.index("valid" if drawn < job.valid else "train"), line, drawn)


class _Joined:
    """Puts the pieces of a long document together, which comes out with the last of them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._start()

    def _start(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._is_blank, self._is_bad = True, False

    def add(self, encoded: Encoded) -> Encoded:
        piece = encoded.piece
        if piece is None:
            return encoded
        encoded = encoded._replace(piece=None)
        if self._is_bad:  # that is told once
            encoded = encoded._replace(bad=[])
        elif encoded.bad:
            self._is_bad = True
            self._tokens.clear()
        else:
            self._tokens.append(piece.tokens)
            self._is_blank = self._is_blank and piece.is_blank
        if piece.place is None:
            return encoded
        if self._is_blank and not self._is_bad:
            encoded.bad.append(_bad(self._job, encoded.last, BadRecord("empty")))
        elif not self._is_bad:
            encoded.splits[piece.place.split].add(self._tokens, piece.place.about, self._job.tokenizer)
            encoded = encoded._replace(least=piece.place.least)
        self._start()
        return encoded


def in_batches(found: Iterable[Record]) -> Iterator[Batch]:
    """Records in batches of about BATCH_BYTES; where a long document comes in pieces each piece apart.

    It is one batch all the same: its last piece ends it, and what stands in front of it does not.
    """
    batch: list[Record] = []
    size = 0
    for record in found:
        if not record.is_whole:
            if batch:
                yield Batch(batch, ends=False)
            yield Batch([record], ends=record.ends)
            batch, size = [], 0
            continue
        batch.append(record)
        size += len(record.data)
        if size >= BATCH_BYTES:
            yield Batch(batch, ends=True)
            batch, size = [], 0
    if batch:
        yield Batch(batch, ends=True)


_job: Job
"""Of a worker process."""


def _begin(job: Job) -> None:
    global _job
    _job = job
    tokenizers.encode_alone()
    processes.follow_parent()


def _work(batch: Batch) -> Encoded:
    return encode(_job, batch)


def encode_all(batches: Iterator[Batch], job: Job, workers: int) -> Generator[Encoded, None, None]:
    """Each batch encoded, in order; a long document, which comes in pieces, is in the last of them."""
    joined = _Joined(job)
    if workers <= 1:
        yield from (joined.add(encode(job, batch)) for batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, processes.context(), initializer=_begin, initargs=(job,)
    )
    waiting: deque[concurrent.futures.Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * workers:  # enough that none waits, little enough to hold in memory
                yield joined.add(waiting.popleft().result())
        while waiting:
            yield joined.add(waiting.popleft().result())
    except concurrent.futures.BrokenExecutor as error:
        raise TextError(
            "a process that encodes was killed, mostly for want of memory. The same command goes on; take "
            "fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
