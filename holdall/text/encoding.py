"""Records to tokens in many processes: batches go out, and come back in order."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from holdall import processes, runs
from holdall.text import tokenizers
from holdall.text.corpus import SPLITS
from holdall.text.sources import BadRecord, Record, Source, TextError, parse
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
            {"path": str(each.path), "bytes": each.size, "modified": each.modified, "valid": each.valid}
            for each in self.sources
        ]
        return {
            "sources": sources,
            "tokenizer": self.tokenizer.describe(),
            "valid": self.valid,
            "text_field": self.text_field,
            "separator": self.separator,
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

    def extend(self, other: Split) -> None:
        self.tokens += other.tokens
        self.lengths += other.lengths
        self.about += other.about


class Encoded(NamedTuple):
    """What became of a batch of records. `last`: file and number of the last one."""

    last: tuple[int, int]
    splits: tuple[Split, Split]
    bad: list[Bad]
    least: float
    """The smallest share that would have taken a document for validation."""


def encode(job: Job, batch: Sequence[Record]) -> Encoded:
    texts: list[str] = []
    about: list[tuple[int, bytes]] = []
    bad: list[Bad] = []
    least = 1.0
    for record in batch:
        source = job.sources[record.file]
        where = source.path.name + (f":{record.number}" if source.is_json or job.separator else "")
        try:
            document = parse(record.data, is_json=source.is_json, text_field=job.text_field)
        except BadRecord as error:
            found = f"{error}, {error.detail}" if error.detail else str(error)
            bad.append(Bad(str(error), f"{source.path}{where.removeprefix(source.path.name)}: {found}"))
            continue
        drawn = 1.0 if source.valid else _drawn(document.text)
        least = min(least, drawn)
        line = json.dumps({**document.about, "source": where}).encode() + b"\n"
        about.append((SPLITS.index("valid" if source.valid or drawn < job.valid else "train"), line))
        texts.append(document.text)
    splits = (Split(), Split())
    end = np.array([job.tokenizer.end], dtype=job.tokenizer.dtype)
    for ids, (split, line) in zip(job.tokenizer.encode_batch(texts), about, strict=True):
        splits[split].tokens += [ids, end]
        splits[split].lengths.append(len(ids) + 1)
        splits[split].about.append(line)
    for each in splits:  # one array travels between processes sooner than many
        each.tokens = [np.concatenate(each.tokens)] if each.tokens else []
    return Encoded((batch[-1].file, batch[-1].number), splits, bad, least)


def _drawn(text: str) -> float:
    """A number from 0 to 1 that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / (1 << 64)


def in_batches(found: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in found:
        batch.append(record)
        size += len(record.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_job: Job
"""Of a worker process."""


def _begin(job: Job) -> None:
    global _job
    _job = job
    tokenizers.encode_alone()
    runs.follow_parent()


def _work(batch: Sequence[Record]) -> Encoded:
    return encode(_job, batch)


def encode_all(batches: Iterator[list[Record]], job: Job, workers: int) -> Generator[Encoded, None, None]:
    """Each batch encoded, in order."""
    if workers <= 1:
        yield from (encode(job, batch) for batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, processes.context(), initializer=_begin, initargs=(job,)
    )
    waiting: deque[concurrent.futures.Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * workers:  # enough that none waits, little enough to hold in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.BrokenExecutor as error:
        raise TextError(
            "a process that encodes was killed, mostly for want of memory. The same command goes on; take "
            "fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
