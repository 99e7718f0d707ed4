"""Writing token shards: worker processes encode, one process reads and writes; interrupted runs resume.

The work is cut into *parts*, each a run of consecutive records that fills a shard. A part's shards are
written first and its record, part-00000.json, last; the record says where the next part starts. So a crash
loses one part at most, and the resulting folder is bit-identical for any number of workers and interruptions.

A hash of a document's text decides whether it is for validation. So copies of a document are always in the
same split, and neither its place nor its neighbours matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdall import files
from holdall.text import tokenizers
from holdall.text.corpus import (
    FILES,
    FORMAT,
    MANIFEST,
    PLAN,
    SHARD,
    SPLITS,
    UNDIVIDED,
    Corpus,
    content_hash,
    is_intact,
    open_corpus,
    read_manifest,
    shard_files,
)
from holdall.text.encoding import BATCH_BYTES, Encoded, Job, Split, encode_all, in_batches
from holdall.text.files import (
    TextError,
    check,
    is_count,
    is_share,
    is_text,
    npy_header,
    read_json,
    read_regular,
    seal,
)
from holdall.text.sources import find, records
from holdall.text.tokenizers import Tokenizer

SHARD_TOKENS = 1 << 24
"""Tokens at which a part ends, both splits together: 32 MiB as uint16."""
EXAMPLES = 5
"""Bad records that are reported individually; the others are only counted."""


@dataclass(frozen=True)
class Progress:
    """Progress of writing a corpus, for progress bars."""

    bytes: int
    """Bytes of the sources read so far, as they are on disk."""
    of_bytes: int
    """Bytes of all sources."""
    documents: int
    tokens: int
    tokens_before: int
    """Tokens that were already written when the work was resumed."""
    left_out: int
    """Records that were left out."""


def write_corpus(
    paths: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    valid: float | Sequence[Path] = 0.01,
    text_field: str = "text",
    separator: str = "",
    strict: bool = False,
    workers: int = 1,
    command: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """Turn documents into a corpus; resume one that was interrupted, return one that is finished.

    Args:
        paths: files and folders, see `sources.find`.
        folder: where shards go; created if needed. Files in it are not taken as sources.
        valid: the share of documents for validation, or the files and folders that hold them.
        text_field: the field of JSON lines that holds the text.
        separator: the string between the documents of a plain text file; if empty, each file is one document.
        strict: raise at the first record that holds no document, instead of leaving it out.
        workers: number of processes that encode.
        command: the command that makes this folder; quoted in errors if it must be made again.
        shard_tokens: tokens at which a part ends, both splits together.

    Raises:
        TextError: something is wrong with sources, tokenizer or folder; the message names the remedy.
        RunError: the folder cannot be written or is in use.
    """
    if workers < 1:
        raise TextError(f"{workers} workers are too few; give at least 1")
    share = valid if isinstance(valid, float | int) else 0.0
    if not 0 <= share < 1:
        raise TextError(f"the share for validation is {share:g}; it must be at least 0 and below 1")
    sources, ignored = find(paths, () if isinstance(valid, float | int) else valid, without=folder)
    job = Job(tuple(sources), tokenizer, float(share), text_field, separator)
    plan = {"format": FORMAT, **job.plan(), "shard_tokens": shard_tokens}
    with files.locked(folder):
        if not _is_finished(folder, plan):
            writer = _Writer(folder, job, strict, shard_tokens, on_progress)
            writer.claim(plan)
            source_records = records(
                sources, after=writer.last, separator=separator, cut=tokenizer.cut, on_bytes=writer.count
            )
            # no more processes than batches: starting one takes a second
            useful = min(workers, 1 + sum(source.size for source in sources) // BATCH_BYTES)
            with contextlib.closing(encode_all(in_batches(source_records), job, useful)) as batches:
                for encoded in batches:
                    writer.add(encoded)
            writer.finish(plan, ignored, command)
    corpus = open_corpus(folder)
    if strict:
        _refuse(corpus.manifest["examples"])
    return corpus


def _refuse(examples: Sequence[str]) -> None:
    if examples:
        raise TextError(f"{examples[0]}. Fix it, or omit --strict: bad records are then left out")


def _is_finished(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether a folder holds this corpus. Raises TextError if it holds another one, or a part of another."""
    if os.path.lexists(folder / MANIFEST):
        name, held = MANIFEST, read_manifest(folder)["plan"]
    elif os.path.lexists(folder / _record(0)) and os.path.lexists(folder / PLAN):
        name, held = PLAN, _read_plan(folder)
    else:
        return False
    if held != plan:
        other = ", ".join(key for key in plan if held.get(key) != plan[key])
        raise TextError(
            f"{folder} holds tokens made with other settings ({other}; see {name}); remove it or choose "
            "another --out"
        )
    return name == MANIFEST


def _read_plan(folder: Path) -> dict[str, Any]:
    """The plan of an unfinished corpus. Raises TextError if it is damaged, or not a plan of Holdall's."""
    try:
        plan: dict[str, Any] = read_json(folder / PLAN)
        check(plan, {"format": is_text})
    except (TextError, ValueError) as error:
        raise TextError(
            f"{error}. {folder / PLAN} is not a plan of Holdall's; choose another --out"
        ) from error
    return plan


def _record(part: int) -> str:
    return f"part-{part:05d}.json"


_PART = {
    "last": [is_count],
    "shards": {...: {**SHARD, "files": FILES}},
    "left_out": {...: is_count},
    "examples": [is_text],
    "least": is_share,
    "undivided": UNDIVIDED,
}


def _read_part(folder: Path, number: int, sources: int) -> dict[str, Any] | None:
    """The record of a part whose shards are intact; None if the part must be made again.

    Names in the record are used only if they are those that its shards must have.
    """
    try:
        part: dict[str, Any] = read_json(folder / _record(number))
        check(part, _PART)
    except (TextError, ValueError):
        return None
    if seal(part) != part or len(part["last"]) != 2 or part["last"][0] >= sources:
        return None
    for split, shard in part["shards"].items():
        if (
            split not in SPLITS
            or shard["number"] != number
            or set(shard["files"]) != {*shard_files(split, number)}
        ):
            return None
        if not all(is_intact(folder / name, known) for name, known in shard["files"].items()):
            return None
    return part


# ---------------------------------------------------------------------------------------------- writing


class _Writer:
    """Collects encoded batches into parts, and writes them."""

    def __init__(
        self,
        folder: Path,
        job: Job,
        strict: bool,
        shard_tokens: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.folder, self.job, self.strict = folder, job, strict
        self.shard_tokens, self.on_progress = shard_tokens, on_progress
        self.parts: list[dict[str, Any]] = []
        while part := _read_part(folder, len(self.parts), len(job.sources)):
            self.parts.append(part)
        self.last: tuple[int, int] = tuple(self.parts[-1]["last"]) if self.parts else (0, 0)
        self.left_out = sum((Counter(part["left_out"]) for part in self.parts), Counter[str]())
        self.bytes = 0
        self.tokens = sum(shard["tokens"] for part in self.parts for shard in part["shards"].values())
        self.documents = sum(shard["documents"] for part in self.parts for shard in part["shards"].values())
        self.tokens_before = self.tokens
        for part in self.parts:
            if strict:
                _refuse(part["examples"])
        self._start_part()

    def _start_part(self) -> None:
        self.splits = (Split(), Split())
        self.part_tokens = 0
        self.part_bad: Counter[str] = Counter()
        self.examples: list[str] = []
        self.undivided: dict[str, Any] = {"files": 0, "examples": []}
        self.least = 1.0

    def claim(self, plan: dict[str, Any]) -> None:
        """Record the plan in the folder, and remove what an interrupted write left there."""
        digits = "[0-9]" * 5
        there = [file for name in (*SPLITS, "part") for file in self.folder.glob(f"{name}-{digits}.*")]
        finished = {_record(number) for number in range(len(self.parts))}
        finished |= {
            name for part in self.parts for shard in part["shards"].values() for name in shard["files"]
        }
        tokenizer = self.job.tokenizer.file
        copy = self.folder / tokenizers.FILE
        if not os.path.lexists(self.folder / PLAN):
            if tokenizer and os.path.lexists(copy) and read_regular(copy) != tokenizer:
                there.append(copy)
            if there:
                raise TextError(
                    f"{there[0]} is in the way, and without {PLAN} it is not Holdall's; choose another --out"
                )
        else:
            _read_plan(self.folder)
            for file in (*there, *self.folder.glob(".*.tmp")):
                if file.name not in finished:
                    self._remove(file.name)
        files.write_json(self.folder / PLAN, plan)
        if tokenizer:
            files.write_atomically(copy, tokenizer)

    def _remove(self, name: str) -> None:
        with files.explained(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def count(self, count: int) -> None:
        self.bytes += count

    def add(self, encoded: Encoded) -> None:
        """Add a batch to the current part, which is written when it is full."""
        messages = [record.message for record in encoded.bad]
        if self.strict:
            _refuse(messages)
        self.part_bad.update(record.reason for record in encoded.bad)
        self.left_out.update(record.reason for record in encoded.bad)
        self.examples = (self.examples + messages)[:EXAMPLES]
        for mine, theirs in zip(self.splits, encoded.splits, strict=True):
            mine.extend(theirs)
            self.documents += len(theirs.lengths)
            self.tokens += sum(theirs.lengths)
            self.part_tokens += sum(theirs.lengths)
        self._count_undivided(encoded.undivided)
        self.last, self.least = encoded.last, min(self.least, encoded.least)
        if not self.documents and self.left_out["no text"]:
            raise TextError(f"{self.examples[0]}. Name the right one with --text-field")
        if encoded.ends and self.part_tokens >= self.shard_tokens:
            self._commit()
        size = sum(source.size for source in self.job.sources)
        left_out = self.left_out.total()
        self.on_progress(
            Progress(self.bytes, size, self.documents, self.tokens, self.tokens_before, left_out)
        )

    def _count_undivided(self, files: list[str]) -> None:
        self.undivided["files"] += len(files)
        self.undivided["examples"] = [*self.undivided["examples"], *files][:EXAMPLES]

    def _commit(self) -> None:
        number = len(self.parts)
        shards = {
            name: self._write_shard(name, number, split)
            for name, split in zip(SPLITS, self.splits, strict=True)
            if split.lengths
        }
        part = {
            "last": self.last,
            "shards": shards,
            "left_out": dict(self.part_bad),
            "examples": self.examples,
            "least": self.least,
            "undivided": self.undivided,
        }
        part = seal(part)
        files.write_json(self.folder / _record(number), part)
        self.parts.append(part)
        self._start_part()

    def _write_shard(self, name: str, number: int, split: Split) -> dict[str, Any]:
        starts = np.cumsum([0, *split.lengths[:-1]], dtype="<i8")
        tokens = sum(split.lengths)
        content = hashlib.sha256()
        arrays = [array.data for array in (*split.tokens, starts)]
        for array in arrays:
            content.update(array)
        # arrays are written one by one: a concatenated copy of a long document would double the memory
        written: tuple[Sequence[bytes | memoryview], ...] = (
            [npy_header(self.job.tokenizer.dtype, tokens), *arrays[:-1]],
            [npy_header(starts.dtype, len(starts)), arrays[-1]],
            split.about,
        )
        files = {
            file: self._write(file, chunks)
            for file, chunks in zip(shard_files(name, number), written, strict=True)
        }
        return {
            "number": number,
            "tokens": tokens,
            "documents": len(starts),
            "content": content.hexdigest(),
            "files": files,
        }

    def _write(self, name: str, chunks: Sequence[bytes | memoryview]) -> dict[str, Any]:
        """Write a file from chunks; returns its size and hash."""
        size, digest = 0, hashlib.sha256()
        with files.replacing(self.folder / name) as temporary, temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += memoryview(chunk).nbytes
        return {"bytes": size, "sha256": digest.hexdigest()}

    def finish(self, plan: dict[str, Any], ignored: int, command: str) -> None:
        """Write the last part and, last of all, the manifest."""
        if self.splits[0].lengths or self.splits[1].lengths or self.part_bad or self.undivided["files"]:
            self._commit()
        self._check_splits()
        splits: dict[str, Any] = {}
        written: dict[str, Any] = {}
        for name in SPLITS:
            shards = [part["shards"][name] for part in self.parts if name in part["shards"]]
            for shard in shards:
                written |= shard["files"]
            splits[name] = {
                "tokens": sum(shard["tokens"] for shard in shards),
                "documents": sum(shard["documents"] for shard in shards),
                "shards": [{key: shard[key] for key in shard if key != "files"} for shard in shards],
            }
        tokenizer = self.job.tokenizer
        if tokenizer.file:
            written[tokenizers.FILE] = {
                "bytes": len(tokenizer.file),
                "sha256": hashlib.sha256(tokenizer.file).hexdigest(),
            }
        manifest = {
            "format": FORMAT,
            "command": files.encodable(command),
            "tokenizer": tokenizer.describe(),
            "dtype": tokenizer.dtype.name,
            **splits,
            "left_out": dict(self.left_out),
            "examples": [example for part in self.parts for example in part["examples"]][:EXAMPLES],
            "ignored_files": ignored,
            "plan": plan,
            "files": written,
        }
        if undivided := [part["undivided"] for part in self.parts if part["undivided"]["files"]]:
            manifest["undivided"] = {
                "files": sum(of_part["files"] for of_part in undivided),
                "examples": [name for of_part in undivided for name in of_part["examples"]][:EXAMPLES],
            }
        manifest["content_hash"] = content_hash(manifest)
        files.write_json(self.folder / MANIFEST, seal(manifest))
        self._remove_parts()

    def _check_splits(self) -> None:
        """Raise TextError if a requested split has no documents; the folder can then be used again."""
        there = {name for part in self.parts for name in part["shards"]}
        wrong = ""
        if not there:
            examples = [example for part in self.parts for example in part["examples"]]
            wrong = "the sources hold no documents" + "".join(f"; {example}" for example in examples[:1])
        elif "train" not in there:
            wrong = "every document is for validation and none for training; give a smaller --valid"
        elif "valid" not in there and self.job.valid:
            least = min(part["least"] for part in self.parts)
            wrong = (
                f"none of {self.documents:,} documents is for validation at --valid {self.job.valid:g}; give "
                f"a share above {least:.2g}, a file of its own (--valid FILE) or 0 for none"
            )
            if self.documents < 10:
                wrong += ". A plain text file is one document, unless --separator says where to split it"
        if wrong:
            for number, part in enumerate(self.parts):
                for split in part["shards"]:
                    for name in shard_files(split, number):
                        self._remove(name)
            self._remove_parts()
            raise TextError(wrong)

    def _remove_parts(self) -> None:
        """Remove the records of parts and, last, the plan, which marks the folder as Holdall's."""
        for number in range(len(self.parts)):
            self._remove(_record(number))
        self._remove(PLAN)
