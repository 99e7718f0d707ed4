"""Documents from files: plain text and JSON lines, as they are or compressed, and folders of them.

A *record* is what holds one document: a line of JSON, a whole file of plain text, or what stands between two
separators in one. One process finds records, in order; `parse` may run in many. A record that is no document
(bad UTF-8, broken JSON, no text) is told by the reason, never guessed at.
"""

from __future__ import annotations

import importlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from holdall.runs import RunError

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN_TEXT = (".txt", ".text", ".md")
COMPRESSED = (".xz", ".gz", ".zst")
CHUNK = 1 << 18
"""Bytes read at once."""


class TextError(RunError):
    """Something about texts, tokenizers or token shards that a user can mend; the message says how."""


class BadRecord(Exception):  # noqa: N818 - a finding about a text, not a fault
    """A record that holds no document; the reason is the message, what it was found in `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def needed(module: str) -> Any:
    """A module of the extra `text`, imported now. Raises TextError, which names its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TextError(f"this needs the package {module}: pip install {module}") from error


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that holds documents.

    size, modified: bytes and seconds; whoever goes on with interrupted work asks whether they still hold.
    valid: all its documents are for validation.
    """

    path: Path
    size: int
    modified: int
    valid: bool = False

    @property
    def is_json(self) -> bool:
        return _kind(self.path) in JSON_LINES


class Record(NamedTuple):
    """The bytes that hold a document: number `number`, from 1, of file `file` of a list of sources."""

    file: int
    number: int
    data: bytes


class Document(NamedTuple):
    """A text, and its id and title where the source has them."""

    text: str
    about: dict[str, str]


def find(
    paths: Sequence[Path], valid: Sequence[Path] = (), *, without: Path | None = None
) -> tuple[list[Source], int]:
    """The files that paths name, folders by name in depth, and how many files in folders are of other kinds.

    A file below `valid` is for validation even if `paths` name it too. Any file may be named; in folders
    those that end in .jsonl, .ndjson, .json, .txt, .text or .md count, compressed or not. What lies in the
    folder `without` is no source.
    """
    found: dict[Path, Source] = {}
    ignored = 0
    for path, is_valid in (*((path, True) for path in valid), *((path, False) for path in paths)):
        files, others = _files(path, without)
        ignored += others
        for file in files:
            stat = file.stat()
            source = Source(path=file, size=stat.st_size, modified=int(stat.st_mtime), valid=is_valid)
            found.setdefault(file.resolve(), source)
    sources = list(found.values())
    return [each for each in sources if not each.valid] + [each for each in sources if each.valid], ignored


def _files(path: Path, without: Path | None) -> tuple[list[Path], int]:
    """The files of texts that a path names, and how many others there are."""
    if path.is_file():
        return [path], 0
    if not path.is_dir():
        raise TextError(f"{path} is neither a file nor a folder")
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
    if without is not None:
        inside = [file for file in inside if without.resolve() not in file.resolve().parents]
    known = [file for file in inside if _kind(file) in JSON_LINES + PLAIN_TEXT]
    if not known:
        raise TextError(f"{path} holds no text: no {', '.join(JSON_LINES + PLAIN_TEXT)}, also compressed")
    return known, len(inside) - len(known)


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _kind(path: Path) -> str:
    """The ending that says what is in a file, whatever compresses it."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


# ---------------------------------------------------------------------------------------------- records


def records(
    sources: Sequence[Source],
    *,
    after: tuple[int, int] = (0, 0),
    separator: str = "",
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Iterator[Record]:
    """All records of all sources in order, behind the one with file and number `after`.

    separator: what parts the documents of a plain text file; each is one document if it is empty.
    on_bytes: told how many bytes of the files were read or passed over.
    """
    for index, source in enumerate(sources):
        if index < after[0]:
            on_bytes(source.size)
            continue
        first = after[1] if index == after[0] else 0
        for number, data in enumerate(_split(source, separator, on_bytes), 1):
            # an empty line, or what follows the last separator, is no record
            if number > first and (data.strip() or not (source.is_json or separator)):
                yield Record(index, number, data)


def _split(source: Source, separator: str, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    at = b"\n" if source.is_json else separator.encode()
    held: list[bytes] = []
    for chunk in _without_mark(_chunks(source.path, on_bytes)):
        if not at:
            held.append(chunk)
            continue
        if len(at) > 1 and held:  # the separator may lie across two chunks
            last, keep = held.pop(), len(at) - 1
            held.append(last[:-keep])
            chunk = last[-keep:] + chunk
        first, *rest = chunk.split(at)
        held.append(first)
        for part in rest:
            yield b"".join(held)
            held = [part]
    yield b"".join(held)


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """A file's bytes without the mark that some editors put in front of UTF-8."""
    yield next(chunks, b"").removeprefix(b"\xef\xbb\xbf")
    yield from chunks


def _chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """A file's bytes, decompressed. Raises TextError where it is damaged or ends too early."""
    new = _decompressor(path)
    engine: Any = None
    try:
        with path.open("rb") as file:
            while raw := file.read(CHUNK):
                on_bytes(len(raw))
                if new is None:
                    yield raw
                    continue
                while raw:
                    engine = engine or new()
                    yield engine.decompress(raw)
                    raw = b""
                    if engine.eof:  # what follows is another stream, or padding
                        raw, engine = engine.unused_data.lstrip(b"\0"), None
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        if new is None or isinstance(error, TextError):
            raise
        raise TextError(f"{path} is damaged: {error}. Get it anew or leave it out") from error
    if engine is not None:
        raise TextError(f"{path} is truncated: its compressed data has no end. Get it anew or leave it out")


def _decompressor(path: Path) -> Callable[[], Any] | None:
    """What makes a new decompressor for a file; None if it is not compressed."""
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return lzma.LZMADecompressor
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    if suffix == ".zst":
        # archives of texts are often packed with a window of 2 GiB
        unpacker = needed("zstandard").ZstdDecompressor(max_window_size=1 << 31)
        return lambda: unpacker.decompressobj()
    return None


# ---------------------------------------------------------------------------------------------- parsing


def parse(data: bytes, *, is_json: bool, text_field: str) -> Document:
    """The document that a record holds. Raises BadRecord with the reason if it holds none."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord("bad UTF-8", f"byte {error.start + 1}") from None
    about: dict[str, str] = {}
    if is_json:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRecord("broken JSON", str(error)) from None
        if not isinstance(value, dict):
            raise BadRecord("broken JSON", "not an object")
        found = value.get(text_field)
        if not isinstance(found, str):
            raise BadRecord("no text", f"no '{text_field}' among the fields {', '.join(map(str, value))}")
        text = found
        if _has_surrogate(text):
            raise BadRecord("bad UTF-8", "half of a surrogate pair")
        known = {name: value.get(name) for name in ("id", "title")}
        about = {name: str(each) for name, each in known.items() if isinstance(each, str | int)}
    if not text.strip():
        raise BadRecord("empty")
    return Document(text, about)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
