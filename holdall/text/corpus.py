"""A corpus: the folder of token shards that `holdall data` leaves, memory-mapped.

manifest.json                  counts, settings, hashes; written last: a folder without it is unfinished
train-00000.npy                token ids, uint16 or uint32: whole documents, each with its end-of-text token
train-00000.documents.npy      where each document starts in that shard, int64
train-00000.about.jsonl        id, title and source of each document, one line each
valid-00000.npy, ...           the same for the documents that are for validation
tokenizer.json                 the tokenizer's file, if it has one, so that the folder stands alone
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdall.text import tokenizers
from holdall.text.sources import TextError
from holdall.text.tokenizers import Tokenizer

MANIFEST, PLAN = "manifest.json", "plan.json"
FORMAT = "holdall-tokens-1"
"""Changes when a folder of before can no longer be read."""
SPLITS = ("train", "valid")


def shard_files(split: str, number: int) -> tuple[str, str, str]:
    """The names of a shard's files: tokens, starts of documents, what is known about them."""
    stem = f"{split}-{number:05d}"
    return f"{stem}.npy", f"{stem}.documents.npy", f"{stem}.about.jsonl"


class Tokens:
    """All tokens of one split, its shards end to end; only what `tokens[start:stop]` asks for is read."""

    def __init__(self, folder: Path, split: str, shards: Sequence[Mapping[str, Any]]) -> None:
        self._files = [tuple(folder / name for name in shard_files(split, each["number"])) for each in shards]
        self._first_token = np.cumsum([0, *(each["tokens"] for each in shards)])
        self._first_document = np.cumsum([0, *(each["documents"] for each in shards)])
        self._shards = [np.load(files[0], mmap_mode="r") for files in self._files]

    def __len__(self) -> int:
        return int(self._first_token[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens start:stop as int64, across shards; bounds as those of a list, no step."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read without a step, not with {step}")
        out = np.empty(max(0, stop - start), dtype=np.int64)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self._first_token, at, side="right")) - 1
            first = int(self._first_token[shard])
            until = min(stop, int(self._first_token[shard + 1]))
            out[at - start : until - start] = self._shards[shard][at - first : until - first]
            at = until
        return out

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Where each document starts, ascending, (documents,) int64; each ends where the next one starts."""
        starts = [np.load(files[1]) for files in self._files]
        moved = [each + first for each, first in zip(starts, self._first_token, strict=False)]
        return np.concatenate([np.empty(0, dtype=np.int64), *moved])

    def document_of(self, position: int) -> int:
        """The index of the document that holds a token."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside of {len(self)} tokens")
        return int(np.searchsorted(self.documents, position, side="right")) - 1

    def about(self, index: int) -> dict[str, str]:
        """What the source says of a document: `source` (file and record), and `id` and `title` if it does."""
        if not 0 <= index < self._first_document[-1]:
            raise IndexError(f"document {index} is outside of {self._first_document[-1]} documents")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        line = _lines(self._files[shard][2])[index - int(self._first_document[shard])]
        about: dict[str, str] = json.loads(line)
        return about


@functools.lru_cache(maxsize=8)
def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


@dataclass(frozen=True)
class Corpus:
    """The tokens that a model is trained and validated on.

    content_hash: of the tokens of both splits, their documents and order, and the tokenizer.
    """

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
        return str(self.manifest["content_hash"])


def open_corpus(
    folder: Path, *, verify: bool = False, on_bytes: Callable[[int], None] | None = None
) -> Corpus:
    """Open a finished corpus.

    Every file's size is compared with the manifest; with `verify` every file is read and hashed too, and
    `on_bytes` is told how much was.

    Raises TextError, which names the file that is missing, truncated or altered, and the way out.
    """
    manifest = read_manifest(folder)
    for name, known in manifest["files"].items():
        if wrong := _difference(folder / name, known, verify, on_bytes or (lambda count: None)):
            raise TextError(f"{folder / name} {wrong}. {_way_out(folder, manifest)}")
    return Corpus(
        folder=folder,
        manifest=manifest,
        tokenizer=tokenizers.from_manifest(manifest["tokenizer"], folder),
        train=Tokens(folder, "train", manifest["train"]["shards"]),
        valid=Tokens(folder, "valid", manifest["valid"]["shards"]),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished corpus says of itself. Raises TextError if it is not finished, damaged or altered."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise TextError(f"{folder} is no folder; `holdall data SOURCE... --out {folder}` makes one")
    if not path.exists():
        unfinished = (folder / PLAN).exists()
        state = (
            "is not finished: give its `holdall data` command again, it goes on"
            if unfinished
            else (
                f"holds no tokens ({MANIFEST} is missing); `holdall data SOURCE... --out {folder}` makes them"
            )
        )
        raise TextError(f"{folder} {state}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        made = manifest["format"]
        intact = made != FORMAT or content_hash(manifest) == manifest["content_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(f"{path} is damaged ({type(error).__name__}). {_way_out(folder, {})}") from error
    if made != FORMAT:
        raise TextError(f"{path} has the format {made}, not {FORMAT}. {_way_out(folder, manifest)}")
    if not intact:
        raise TextError(f"{path} was altered: its hashes do not fit. {_way_out(folder, manifest)}")
    return manifest


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Of what a model sees: tokenizer, and tokens and documents of both splits in order."""
    tokenizer = {key: manifest["tokenizer"][key] for key in ("kind", "vocab", "end", "sha256")}
    shards = [[shard["content"] for shard in manifest[split]["shards"]] for split in SPLITS]
    return hashlib.sha256(json.dumps([tokenizer, shards], sort_keys=True).encode()).hexdigest()


def _difference(path: Path, known: Mapping[str, Any], verify: bool, on_bytes: Callable[[int], None]) -> str:
    """What is wrong with a file; empty if nothing is."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != known["bytes"]:
        state = "truncated" if size < known["bytes"] else "altered"
        return f"is {state}: {size:,} bytes, not {known['bytes']:,}"
    if verify:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                on_bytes(len(chunk))
        if digest.hexdigest() != known["sha256"]:
            return "was altered: its content does not fit the manifest's hash"
    return ""


def _way_out(folder: Path, manifest: Mapping[str, Any]) -> str:
    command = manifest.get("command") or "its `holdall data` command"
    return f"Restore it from a copy, or remove {folder} and make it anew: {command}"
