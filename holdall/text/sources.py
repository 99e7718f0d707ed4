"""Documents from plain text and JSON lines files, compressed or not, and folders of them.

A *record* holds one document: a line of JSON, a whole plain text file, or the text between two separators in
one. One process reads the records in order; `parse` may run in many. A record that holds no document (bad
UTF-8, broken JSON, no text) is reported with the reason, never repaired. A long plain text document comes in
pieces, so that memory does not grow with its length.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import importlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from holdall import files
from holdall.text.files import CHUNK, TextError, open_regular

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN_TEXT = (".txt", ".text", ".md")
COMPRESSED = (".xz", ".gz", ".zst")
PIECE_BYTES = 1 << 20
"""Size above which a plain text document comes in pieces."""


class BadRecord(Exception):  # noqa: N818 - about the data, not a bug
    """A record that holds no document; the message is the reason, and `detail` says where or what."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def needed(module: str) -> Any:
    """Import a module of the extra `text`. Raises TextError with the package to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TextError(f"this needs the package {module}: pip install {module}") from error


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that holds documents. Its size and time show a resumed run whether it was changed."""

    path: Path
    size: int
    """Bytes on disk."""
    modified: int
    """Time of the last change, in seconds since 1970."""
    valid: bool = False
    """Whether all its documents are for validation."""

    @property
    def is_json(self) -> bool:
        return _kind(self.path) in JSON_LINES


class Record(NamedTuple):
    """The bytes of a document, or a piece of a long one, which comes as several records of one number."""

    file: int
    """Index of its file in the list of sources."""
    number: int
    """Number of the document in its file, from 1."""
    data: bytes
    start: int = 0
    """Bytes of the document before this piece."""
    ends: bool = True
    """Whether this is the last piece."""
    drawn: float = 0.0
    """`draw` of the whole document, with the last of several pieces."""
    undivided: bool = False
    """Whether a separator was given that does not occur in this file."""

    @property
    def is_whole(self) -> bool:
        return self.ends and not self.start


class Document(NamedTuple):
    """A document's text, and its id and title where the source has them."""

    text: str
    about: dict[str, str]


def find(
    paths: Sequence[Path], valid: Sequence[Path] = (), *, without: Path | None = None
) -> tuple[list[Source], int]:
    """The source files that paths name, and the number of files in folders that were ignored.

    Folders are searched recursively, in order of names, for files that end in .jsonl, .ndjson, .json, .txt,
    .text or .md, compressed or not; a file that is named itself may end in anything. A file below `valid` is
    for validation even if `paths` contain it too. The folder `without` is skipped.
    """
    by_path: dict[Path, Source] = {}
    ignored = 0
    for path, is_valid in (*((path, True) for path in valid), *((path, False) for path in paths)):
        inside, others = _files(path, without)
        ignored += others
        for file in inside:
            stat = file.stat()
            source = Source(path=file, size=stat.st_size, modified=int(stat.st_mtime), valid=is_valid)
            by_path.setdefault(file.resolve(), source)
    sources = list(by_path.values())
    train, held_out = ([source for source in sources if source.valid is valid] for valid in (False, True))
    return train + held_out, ignored


def _files(path: Path, without: Path | None) -> tuple[list[Path], int]:
    """The text files that a path names, and the number of other files."""
    with _readable(path):
        if path.is_file():
            return [_checked(path)], 0
        if not path.is_dir():
            raise TextError(f"{path} is neither a file nor a folder")
    inside = sorted(_walk(path, without and without.resolve()))
    known = [_checked(file) for file in inside if _kind(file) in JSON_LINES + PLAIN_TEXT]
    if not known:
        raise TextError(f"{path} holds no text: no {', '.join(JSON_LINES + PLAIN_TEXT)}, also compressed")
    return known, len(inside) - len(known)


def _walk(folder: Path, without: Path | None) -> Iterator[Path]:
    """The files in a folder and below, except those with hidden names.

    Symbolic links to folders are followed last. Each folder is read once, whichever links lead to it, so that
    cycles end. Raises TextError for a folder that cannot be read.
    """
    folders, links = [folder], list[Path]()
    read = set[tuple[int, int]]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        with _readable(here):
            stat = here.stat()
            if (stat.st_dev, stat.st_ino) in read or here.resolve() == without:
                continue
            read.add((stat.st_dev, stat.st_ino))
            for name in sorted(os.listdir(here)):
                path = here / name
                if name.startswith("."):
                    continue
                if not path.is_dir():
                    yield path
                elif path.is_symlink():
                    links.append(path)
                else:
                    folders.append(path)


def _checked(file: Path) -> Path:
    """The file, if it can be read. Raises TextError otherwise, so that no documents are silently missing."""
    with _readable(file):
        if not file.is_file():
            state = "a broken link" if file.is_symlink() else "not a readable file"
            raise TextError(f"{file} is {state}. Fix it, move it away, or name the files to take")
        if not os.access(file, os.R_OK):
            raise PermissionError(0, "Permission denied")
    return file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TextError(
            f"cannot read {path}: {error.strerror or error}. Make it readable, move it away, or name the "
            "files to take"
        ) from error


def _kind(path: Path) -> str:
    """The suffix of a file's name that says what it holds, without that of its compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


# ---------------------------------------------------------------------------------------------- records


def records(
    sources: Sequence[Source],
    *,
    after: tuple[int, int] = (0, 0),
    separator: str = "",
    cut: Callable[[bytes | bytearray, int], int] = lambda data, start: len(data),
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Iterator[Record]:
    """All records of all sources in order, after the one with file and number `after`.

    separator: the string between the documents of a plain text file; if empty, each file is one document. A
    newline in it matches \\n and \\r\\n.
    cut: the first position from a start on where text may be cut, or its length; see `Tokenizer.cut`.
    on_bytes: called with the number of bytes of the files that were read or skipped.
    """
    for index, source in enumerate(sources):
        if index < after[0]:
            on_bytes(source.size)
            continue
        first = after[1] if index == after[0] else 0
        at, longest = (re.compile(b"\n"), 1) if source.is_json else _separator_pattern(separator)
        number, start, tried = 1, 0, 0
        held, drawn = bytearray(), new_draw()
        for data, end in _split(_without_mark(_chunks(source.path, on_bytes)), at, longest):
            if number > first:
                held += data
            # white space alone does not begin a long document: it may turn out to be no record
            if not source.is_json and len(held) > PIECE_BYTES and (start or not held.isspace()):
                while (place := cut(held, max(PIECE_BYTES, tried))) < len(held):
                    piece = bytes(held[:place])
                    drawn.update(piece)
                    yield Record(index, number, piece, start, ends=False)
                    del held[:place]
                    start, tried = start + place, 0
                tried = len(held)
            if not end:
                continue
            # an empty line, or white space after the last separator, is no record
            if number > first and (
                start or (held and not held.isspace()) or not (source.is_json or separator)
            ):
                drawn.update(held if start else b"")
                share = draw(drawn) if start else 0.0
                undivided = bool(separator) and end is _End.OF_FILE and number == 1 and not source.is_json
                whole, held = bytes(held), bytearray()  # so that a large one is not in memory twice
                yield Record(index, number, whole, start, True, share, undivided)
                del whole
            number, start, tried = number + 1, 0, 0
            held, drawn = bytearray(), new_draw()


def new_draw() -> Any:
    """A hash object for `draw`, to be updated with a document's UTF-8, at once or in pieces."""
    return hashlib.blake2b(digest_size=8)


def draw(hashed: Any) -> float:
    """A pseudorandom number from 0 to 1 that depends on the document's text alone."""
    return int.from_bytes(hashed.digest(), "big") / (1 << 64)


class _End(enum.Enum):
    """What ended a document."""

    SEPARATOR = enum.auto()
    OF_FILE = enum.auto()


def _separator_pattern(separator: str) -> tuple[re.Pattern[bytes] | None, int]:
    """A pattern that matches a separator with either kind of line end, and its maximum length in bytes."""
    if not separator:
        return None, 0
    lines = separator.replace("\r\n", "\n").encode("utf-8", "surrogateescape").split(b"\n")
    longest = sum(map(len, lines)) + 2 * (len(lines) - 1)
    return re.compile(rb"\r?\n".join(map(re.escape, lines))), longest


def _split(
    chunks: Iterator[bytes], at: re.Pattern[bytes] | None, longest: int
) -> Iterator[tuple[bytes, _End | None]]:
    """The bytes of each document as they are read, and what ended it if it ends there."""
    tail = b""
    for chunk in chunks:
        if at is None:
            yield chunk, None
            continue
        chunk, start = tail + chunk, 0
        for match in at.finditer(chunk):
            yield chunk[start : match.start()], _End.SEPARATOR
            start = match.end()
        sure = max(start, len(chunk) - longest + 1)  # a separator may lie across two chunks
        yield chunk[start:sure], None
        tail = chunk[sure:]
    yield tail, _End.OF_FILE


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """A file's bytes without a UTF-8 byte order mark."""
    yield next(chunks, b"").removeprefix(b"\xef\xbb\xbf")
    yield from chunks


def _chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """A file's bytes, decompressed, in chunks. Raises TextError if it is damaged or truncated."""
    new = _unpacker(path)
    with open_regular(path, follow=True) as file:
        stream: _Stream | None = None
        begun = False
        while True:
            try:
                raw = file.read(CHUNK)
            except OSError as error:
                raise TextError(f"cannot read {path}: {error.strerror or error}") from error
            if not raw:
                break
            on_bytes(len(raw))
            if new is None:
                yield raw
                continue
            while raw := raw.lstrip(b"\0") if begun and stream is None else raw:
                stream, begun = stream or new(), True
                try:
                    yield from stream.unpack(raw)
                except Exception as error:  # three libraries raise their own
                    raise TextError(f"{path} is damaged: {error}. Get it again or leave it out") from error
                raw = b""
                if stream.eof:  # what follows is another stream, or padding
                    raw, stream = stream.unused_data, None
    if stream is not None:
        raise TextError(f"{path} is truncated: its compressed data has no end. Get it again or leave it out")


class _Stream(Protocol):
    """One compressed stream of a file. Output can be much larger than input, and so comes in chunks."""

    eof: bool
    unused_data: bytes

    def unpack(self, raw: bytes) -> Iterator[bytes]: ...


class _Xz:
    def __init__(self) -> None:
        self._engine = lzma.LZMADecompressor()
        self.eof, self.unused_data = False, b""

    def unpack(self, raw: bytes) -> Iterator[bytes]:
        yield self._engine.decompress(raw, CHUNK)
        while not (self._engine.eof or self._engine.needs_input):
            yield self._engine.decompress(b"", CHUNK)
        self.eof, self.unused_data = self._engine.eof, self._engine.unused_data


class _Gz:
    def __init__(self) -> None:
        self._engine = zlib.decompressobj(wbits=31)
        self.eof, self.unused_data = False, b""

    def unpack(self, raw: bytes) -> Iterator[bytes]:
        while raw and not self._engine.eof:
            yield self._engine.decompress(raw, CHUNK)
            raw = self._engine.unconsumed_tail
        self.eof, self.unused_data = self._engine.eof, self._engine.unused_data


class _Zst:
    def __init__(self) -> None:
        # text archives are often compressed with a window of 2 GiB
        self._engine = needed("zstandard").ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self.eof, self.unused_data = False, b""
        self._step = 1 << 6
        """Bytes of input per call, adapted to give about CHUNK bytes of output."""

    def unpack(self, raw: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(raw) and not self._engine.eof:
            out = self._engine.decompress(raw[at : at + self._step])
            at += self._step
            self._step = max(16, min(2 * self._step, self._step * CHUNK // max(1, len(out)), CHUNK))
            yield out
        self.eof, self.unused_data = self._engine.eof, self._engine.unused_data + raw[at:]


def _unpacker(path: Path) -> Callable[[], _Stream] | None:
    """The decompressor class for a file; None if it is not compressed."""
    kinds: dict[str, Callable[[], _Stream]] = {".xz": _Xz, ".gz": _Gz, ".zst": _Zst}
    return kinds.get(path.suffix.lower())


# ---------------------------------------------------------------------------------------------- parsing


def decode(data: bytes, start: int = 0) -> str:
    """The text of a record, or of a piece that begins at byte `start` of one. Raises BadRecord."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord("bad UTF-8", f"byte {start + error.start + 1}") from None


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def parse(data: bytes, *, is_json: bool, text_field: str) -> Document:
    """The document that a whole record holds. Raises BadRecord with the reason if it holds none."""
    text = decode(data)
    about: dict[str, str] = {}
    if is_json:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRecord("broken JSON", str(error)) from None
        if not isinstance(value, dict):
            raise BadRecord("broken JSON", "not an object")
        field = value.get(text_field)
        if not isinstance(field, str):
            fields = files.encodable(", ".join(value))
            raise BadRecord("no text", f"no '{files.encodable(text_field)}' among the fields {fields}")
        text = field
        if _has_surrogate(text):
            raise BadRecord("bad UTF-8", "half of a surrogate pair")
        for name in ("id", "title"):
            if isinstance(field := value.get(name), str | int):
                about[name] = files.encodable(str(field))
    if is_blank(text):
        raise BadRecord("empty")
    return Document(text, about)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
