"""A corpus: the folder of token shards that `holdall data` writes, memory-mapped.

manifest.json                  counts, settings, hashes; written last: a folder without it is unfinished
train-00000.npy                token ids, uint16 or uint32: whole documents, each with its end-of-text token
train-00000.documents.npy      where each document starts in that shard, int64
train-00000.about.jsonl        id, title and source of each document, one per line
valid-00000.npy, ...           the same for the validation documents
tokenizer.json                 the tokenizer's file, if it has one, so that the folder stands alone
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdall import files
from holdall.text import tokenizers
from holdall.text.files import (
    TextError,
    check,
    is_count,
    is_hash,
    is_share,
    is_text,
    open_array,
    open_regular,
    read_json,
    read_regular,
    seal,
)
from holdall.text.tokenizers import Tokenizer

MANIFEST, PLAN = "manifest.json", "plan.json"
FORMAT = "holdall-tokens-1"
"""Format version; changes when older folders can no longer be read."""
SPLITS = ("train", "valid")


def shard_files(split: str, number: int) -> tuple[str, str, str]:
    """The names of a shard's files: tokens, document starts, document metadata."""
    stem = f"{split}-{number:05d}"
    return f"{stem}.npy", f"{stem}.documents.npy", f"{stem}.about.jsonl"


class Tokens:
    """All tokens of one split, its shards concatenated; `tokens[start:stop]` reads only that slice.

    Raises TextError, which names the file, if a file does not hold what the manifest says.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shards: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        way_out: str = "",
    ) -> None:
        self._shards, self._vocab, self._end, self._way_out = shards, tokenizer.vocab, tokenizer.end, way_out
        self._files = [
            tuple(folder / name for name in shard_files(split, shard["number"])) for shard in shards
        ]
        self._first_token = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self._first_document = np.cumsum([0, *(shard["documents"] for shard in shards)])
        with explained(way_out):
            self._tokens = [
                open_array(files[0], tokenizer.dtype, shard["tokens"])
                for files, shard in zip(self._files, shards, strict=True)
            ]
            for index in range(len(shards)):
                self._open_starts(index)
        self._about = functools.lru_cache(maxsize=8)(self._read_about)

    def __len__(self) -> int:
        return int(self._first_token[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens start:stop as int64, across shards; bounds as in list slicing, without a step."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are sliced without a step, not with {step}")
        out = np.empty(max(0, stop - start), dtype=np.int64)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self._first_token, at, side="right")) - 1
            first = int(self._first_token[shard])
            until = min(stop, int(self._first_token[shard + 1]))
            out[at - start : until - start] = self._tokens[shard][at - first : until - first]
            if (largest := out[at - start : until - start].max()) >= self._vocab:
                raise TextError(
                    f"{self._files[shard][0]} was altered: it holds the token {largest}, and the vocabulary "
                    f"has {self._vocab}. {self._way_out}"
                )
            at = until
        return out

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Index of each document's first token, ascending, (documents,) int64."""
        with explained(self._way_out):
            starts = [self._read_starts(index) for index in range(len(self._shards))]
        shifted = [starts_D + first for starts_D, first in zip(starts, self._first_token, strict=False)]
        return np.concatenate([np.empty(0, dtype=np.int64), *shifted])

    def document_of(self, position: int) -> int:
        """The index of the document that contains the token at `position`."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside of {len(self)} tokens")
        return int(np.searchsorted(self.documents, position, side="right")) - 1

    def about(self, index: int) -> dict[str, str]:
        """A document's metadata: `source` (file and record), and its `id` and `title` if there are any."""
        if not 0 <= index < self._first_document[-1]:
            raise IndexError(f"document {index} is outside of {self._first_document[-1]} documents")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        with explained(self._way_out):
            return self._about(shard)[index - int(self._first_document[shard])]

    def verify(self) -> None:
        """Read and check everything. Raises TextError if anything differs from what was written."""
        for shard, known in enumerate(self._shards):
            with explained(self._way_out):
                starts, tokens = self._read_starts(shard), self._tokens[shard]
                self._about(shard)
                ends = np.asarray(tokens[np.append(starts[1:], len(tokens)) - 1])
                if (ends != self._end).any():
                    document = int(np.argmax(ends != self._end))
                    raise TextError(
                        f"{self._files[shard][0]} was altered: its document {document} does not end in the "
                        "end-of-text token"
                    )
            digest = hashlib.sha256()
            for at in range(int(self._first_token[shard]), int(self._first_token[shard + 1]), 1 << 20):
                until = min(at + (1 << 20), int(self._first_token[shard + 1]))
                digest.update(self[at:until].astype(tokens.dtype).data)
            digest.update(starts.astype("<i8").data)
            if digest.hexdigest() != known["content"]:
                raise TextError(
                    f"{self._files[shard][0]} was altered: its content does not match the manifest's hash. "
                    f"{self._way_out}"
                )

    def _open_starts(self, shard: int) -> np.ndarray:
        return open_array(self._files[shard][1], np.dtype("<i8"), self._shards[shard]["documents"])

    def _read_starts(self, shard: int) -> np.ndarray:
        starts = np.array(self._open_starts(shard))
        if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= self._shards[shard]["tokens"]:
            raise TextError(
                f"{self._files[shard][1]} was altered: document starts do not ascend from 0 within "
                f"{self._shards[shard]['tokens']:,} tokens"
            )
        return starts

    def _read_about(self, shard: int) -> list[dict[str, str]]:
        path = self._files[shard][2]
        lines = read_regular(path).splitlines()
        try:
            if len(lines) != self._shards[shard]["documents"]:
                raise ValueError(f"{len(lines):,} lines for {self._shards[shard]['documents']:,} documents")
            documents = [files.loads(line) for line in lines]
            check(documents, [{"source": is_text, ...: is_text}], "line")
        except ValueError as error:
            raise TextError(f"{path} is damaged ({error})") from error
        return documents


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens with their tokenizer."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Tokens
    valid: Tokens

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @property
    def content_hash(self) -> str:
        """Hash of the tokens of both splits, their documents and order, and the tokenizer."""
        return str(self.manifest["content_hash"])


def open_corpus(
    folder: Path, *, verify: bool = False, on_bytes: Callable[[int], None] | None = None
) -> Corpus:
    """Open a finished corpus.

    Every file's size is compared with the manifest. With `verify` every file is also read and hashed, and
    `on_bytes` is called with the number of bytes of each block.

    Raises TextError, which names the file that is missing, truncated or altered, and the remedy.
    """
    manifest = read_manifest(folder)
    way_out = _way_out(folder, manifest)
    with explained(way_out):
        for name, known in manifest["files"].items():
            _check_file(folder / name, known, verify, on_bytes or (lambda count: None))
        tokenizer = tokenizers.from_manifest(manifest["tokenizer"], folder)
    train, valid = (Tokens(folder, split, manifest[split]["shards"], tokenizer, way_out) for split in SPLITS)
    if verify:
        train.verify()
        valid.verify()
    return Corpus(folder=folder, manifest=manifest, tokenizer=tokenizer, train=train, valid=valid)


@contextlib.contextmanager
def explained(way_out: str) -> Iterator[None]:
    """Append the remedy to the message of a TextError."""
    try:
        yield
    except TextError as error:
        raise TextError(f"{error}. {way_out}") from error


_FILE = {"bytes": is_count, "sha256": is_hash}
SHARD = {"number": is_count, "tokens": is_count, "documents": is_count, "content": is_hash}
_SPLIT = {"tokens": is_count, "documents": is_count, "shards": [SHARD]}
UNDIVIDED = {"files": is_count, "examples": [is_text]}
FILES = {...: _FILE}
_MANIFEST = {
    "format": is_text,
    "command": is_text,
    "tokenizer": {
        "kind": lambda kind: kind in ("bytes", "file"),
        "name": is_text,
        "vocab": is_count,
        "end": is_count,
        "sha256": is_text,
    },
    "dtype": is_text,
    **dict.fromkeys(SPLITS, _SPLIT),
    "left_out": {...: is_count},
    "examples": [is_text],
    "ignored_files": is_count,
    "plan": {"valid": is_share},
    "files": FILES,
    "content_hash": is_hash,
}
_LATER = {"undivided": UNDIVIDED, "hash": is_hash}
"""Keys that manifests of older versions may lack."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished corpus, checked for consistency.

    It lists exactly the files of its shards, so that no name in it leads elsewhere. Raises TextError if the
    corpus is not finished, or its manifest is damaged or altered.
    """
    path = folder / MANIFEST
    if not os.path.isdir(folder):
        raise TextError(f"{folder} is not a folder; `holdall data SOURCE... --out {folder}` makes one")
    if not os.path.lexists(path):
        unfinished = os.path.lexists(folder / PLAN)
        state = (
            "is not finished: run its `holdall data` command again, which resumes it"
            if unfinished
            else (
                f"holds no tokens ({MANIFEST} is missing); `holdall data SOURCE... --out {folder}` makes them"
            )
        )
        raise TextError(f"{folder} {state}")
    with explained(_way_out(folder, {})):
        manifest = read_json(path)
        made = manifest.get("format") if isinstance(manifest, dict) else None
        if isinstance(made, str) and made != FORMAT:
            raise TextError(f"{path} has the format {made}, not {FORMAT}")
        try:
            check(manifest, _MANIFEST)
            check(manifest, {key: _LATER[key] for key in _LATER if key in manifest})
        except ValueError as error:
            raise TextError(f"{path} is damaged ({error})") from error
    with explained(_way_out(folder, manifest)):
        # corpora made before manifests had a hash of their own are accepted without one
        sealed = "hash" not in manifest or seal(manifest) == manifest
        if content_hash(manifest) != manifest["content_hash"] or not sealed:
            raise TextError(f"{path} was altered: its hashes do not match")
        if wrong := _contradiction(manifest):
            raise TextError(f"{path} was altered: {wrong}")
    return manifest


def _contradiction(manifest: Mapping[str, Any]) -> str:
    """What in a manifest contradicts the rest of it; empty if nothing does."""
    names = {tokenizers.FILE} if manifest["tokenizer"]["kind"] == "file" else set[str]()
    for split in SPLITS:
        shards = manifest[split]["shards"]
        numbers = [shard["number"] for shard in shards]
        if numbers != sorted(set(numbers)):
            return f"the shards of {split} are not in order"
        for shard in shards:
            names.update(shard_files(split, shard["number"]))
            if not 1 <= shard["documents"] <= shard["tokens"]:
                return f"shard {shard['number']} of {split} has {shard['documents']} documents"
        for count in ("tokens", "documents"):
            if manifest[split][count] != sum(shard[count] for shard in shards):
                return f"the number of {count} of {split} is not the sum over its shards"
    if set(manifest["files"]) != names:
        return f"its files are not those of its shards: {', '.join(sorted(set(manifest['files']) ^ names))}"
    if manifest["tokenizer"]["kind"] == "bytes" and manifest["tokenizer"] != tokenizers.Bytes().describe():
        return "its tokenizer is not the byte tokenizer"
    vocab, end = manifest["tokenizer"]["vocab"], manifest["tokenizer"]["end"]
    if end >= vocab or manifest["dtype"] != ("uint16" if vocab <= 1 << 16 else "uint32"):
        return f"{manifest['dtype']} and end token {end} do not fit a vocabulary of {vocab}"
    return ""


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Hash of what a model sees: the tokenizer, and the tokens and documents of both splits in order."""
    tokenizer = {key: manifest["tokenizer"][key] for key in ("kind", "vocab", "end", "sha256")}
    shards = [[shard["content"] for shard in manifest[split]["shards"]] for split in SPLITS]
    return hashlib.sha256(json.dumps([tokenizer, shards], sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, known: Mapping[str, Any], verify: bool, on_bytes: Callable[[int], None]) -> None:
    """Raise TextError unless a file has the known size and, with `verify`, the known content."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != known["bytes"]:
            state = "truncated" if size < known["bytes"] else "altered"
            raise TextError(f"{path} is {state}: {size:,} bytes, not {known['bytes']:,}")
        if not verify:
            return
        digest = hashlib.sha256()
        try:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                on_bytes(len(chunk))
        except OSError as error:
            raise TextError(f"cannot read {path}: {error.strerror or error}") from error
        if digest.hexdigest() != known["sha256"]:
            raise TextError(f"{path} was altered: its content does not match the manifest's hash")


def is_intact(path: Path, known: Mapping[str, Any]) -> bool:
    """Whether a file has the size and the hash that a manifest or a part's record says."""
    try:
        _check_file(path, known, True, lambda count: None)
    except TextError:
        return False
    return True


def _way_out(folder: Path, manifest: Mapping[str, Any]) -> str:
    command = str(manifest.get("command") or "")
    command = command if command.startswith("holdall ") else "its `holdall data` command"
    return f"Restore it from a copy, or remove {folder} and make it again: {command}"
