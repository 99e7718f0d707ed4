"""From records to tokens in several processes: batches are sent out, and results come back in order."""

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
"""Bytes of records in a batch for a worker."""


@dataclass(frozen=True)
class Job:
    """The settings that a worker needs."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    valid: float
    text_field: str
    separator: str

    def plan(self) -> dict[str, Any]:
        """Everything that determines the output, as plain JSON values."""
        sources = [
            {
                "path": files.encodable(str(source.path)),
                "bytes": source.size,
                "modified": source.modified,
                "valid": source.valid,
            }
            for source in self.sources
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
    message: str
    """Where the record is, and what is wrong with it."""


@dataclass
class Split:
    """Documents of one split, their tokens concatenated."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    about: list[bytes] = field(default_factory=list)

    def add(self, tokens: list[np.ndarray], about: bytes, tokenizer: Tokenizer) -> None:
        """Append a document and its end-of-text token."""
        self.tokens += [*tokens, np.array([tokenizer.end], dtype=tokenizer.dtype)]
        self.lengths.append(sum(map(len, tokens)) + 1)
        self.about.append(about)

    def extend(self, other: Split) -> None:
        self.tokens += other.tokens
        self.lengths += other.lengths
        self.about += other.about


class Piece(NamedTuple):
    """An encoded piece of a document that is longer than a batch."""

    tokens: np.ndarray
    is_blank: bool
    place: Place | None
    """The document's place, with its last piece; None with the others."""


class Place(NamedTuple):
    """Where a document goes."""

    split: int
    """Index of its split in SPLITS."""
    about: bytes
    """Its line of metadata."""
    least: float
    """The share for validation above which it would be in the validation split."""


class Encoded(NamedTuple):
    """An encoded batch of records, or an encoded piece of a long one: see `in_batches`."""

    last: tuple[int, int]
    """File and number of the last record."""
    ends: bool
    """Whether a part may end after it."""
    splits: tuple[Split, Split]
    bad: list[Bad]
    least: float
    """The smallest share for validation that would have put a document into the validation split."""
    undivided: list[str]
    """Files in which the separator does not occur."""
    piece: Piece | None = None
    """The piece, if the batch is a piece of a long document."""


class Batch(NamedTuple):
    """Whole records, or one piece of a long one."""

    records: list[Record]
    ends: bool
    """Whether a part may end after it."""


MANY = 1 << 23
"""From this many tokens on, arrays are not copied into one."""


def encode(job: Job, batch: Batch) -> Encoded:
    last = batch.records[-1]
    undivided = [
        files.encodable(str(job.sources[record.file].path)) for record in batch.records if record.undivided
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
    for split in out.splits:  # one array is sent between processes faster than many small ones
        if len(split.tokens) > 1 and sum(split.lengths) < MANY:
            split.tokens = [np.concatenate(split.tokens)]
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
    """The suffix ":number" of a record, if its file may hold several."""
    return f":{last[1]}" if job.sources[last[0]].is_json or job.separator else ""


def _bad(job: Job, last: tuple[int, int], error: BadRecord) -> Bad:
    what = f"{error}, {error.detail}" if error.detail else str(error)
    return Bad(str(error), f"{files.encodable(str(job.sources[last[0]].path))}{_number(job, last)}: {what}")


def _place(job: Job, record: Record, about: dict[str, str], drawn: float) -> Place:
    source = job.sources[record.file]
    where = files.encodable(source.path.name) + _number(job, (record.file, record.number))
    line = json.dumps({**about, "source": where}).encode() + b"\n"
    if source.valid:
        return Place(SPLITS.index("valid"), line, 1.0)
    return Place(SPLITS.index("valid" if drawn < job.valid else "train"), line, drawn)


class _Joined:
    """Joins the pieces of a long document, which is returned with its last piece."""

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
        if self._is_bad:  # reported once per document
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


def in_batches(records: Iterable[Record]) -> Iterator[Batch]:
    """Records in batches of about BATCH_BYTES; each piece of a long document is a batch of its own.

    A part must not end within a long document: only the batch of its last piece has `ends` set, and the batch
    before its first piece does not.
    """
    batch: list[Record] = []
    size = 0
    for record in records:
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
"""The job of this worker process."""


def _begin(job: Job) -> None:
    global _job
    _job = job
    tokenizers.encode_alone()
    processes.follow_parent()


def _work(batch: Batch) -> Encoded:
    return encode(_job, batch)


def encode_all(batches: Iterator[Batch], job: Job, workers: int) -> Generator[Encoded, None, None]:
    """Encode batches, in order; a document that comes in pieces is returned with the last one."""
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
            if len(waiting) > 2 * workers:  # keeps all workers busy, and memory bounded
                yield joined.add(waiting.popleft().result())
        while waiting:
            yield joined.add(waiting.popleft().result())
    except concurrent.futures.BrokenExecutor as error:
        raise TextError(
            "a worker process was killed, most likely because memory ran out. The same command resumes; use "
            "fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
