"""Documents from files: plain text and JSON lines, as they are or compressed, and folders of them.

A *record* is what holds one document: a line of JSON, a whole file of plain text, or what stands between two
separators in one. One process finds records, in order; `parse` may run in many. A record that is no document
(bad UTF-8, broken JSON, no text) is told by the reason, never guessed at. A long document of plain text comes
in pieces, so that memory does not grow with its length.
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
"""Of plain text, beyond which a document comes in pieces."""


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
    """The bytes that hold a document: number `number`, from 1, of file `file` of a list of sources.

    A long document comes as several records of one number. start: bytes of it before this piece. ends: no
    other piece follows. drawn: with the last of several pieces, `draw` of the whole.
    undivided: there was a separator to look for, and this file holds it nowhere.
    """

    file: int
    number: int
    data: bytes
    start: int = 0
    ends: bool = True
    drawn: float = 0.0
    undivided: bool = False

    @property
    def is_whole(self) -> bool:
        return self.ends and not self.start


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
        inside, others = _files(path, without)
        ignored += others
        for file in inside:
            stat = file.stat()
            source = Source(path=file, size=stat.st_size, modified=int(stat.st_mtime), valid=is_valid)
            found.setdefault(file.resolve(), source)
    sources = list(found.values())
    return [each for each in sources if not each.valid] + [each for each in sources if each.valid], ignored


def _files(path: Path, without: Path | None) -> tuple[list[Path], int]:
    """The files of texts that a path names, and how many others there are."""
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
    """What is no folder in a folder and all below, hidden names apart.

    Links to folders are followed, after all that is there without them. Each folder is read once, whatever
    leads to it, so that links in a circle end. Raises TextError for a folder that cannot be read.
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
    """A file that can be read. Raises TextError, or its documents would be left out without a word."""
    with _readable(file):
        if not file.is_file():
            state = "a link that leads nowhere" if file.is_symlink() else "no file that can be read"
            raise TextError(f"{file} is {state}. Mend it, move it away, or name the files to take")
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
    """The ending that says what is in a file, whatever compresses it."""
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
    """All records of all sources in order, behind the one with file and number `after`.

    separator: what parts the documents of a plain text file; each is one document if it is empty. A new line
    in it stands for either end of a line, \\n or \\r\\n.
    cut: the first place at or behind a start where text may be cut, see `Tokenizer.cut`; its length for none.
    on_bytes: told how many bytes of the files were read or passed over.
    """
    for index, source in enumerate(sources):
        if index < after[0]:
            on_bytes(source.size)
            continue
        first = after[1] if index == after[0] else 0
        at, longest = (re.compile(b"\n"), 1) if source.is_json else _parting(separator)
        number, start, tried = 1, 0, 0
        held, drawn = bytearray(), new_draw()
        for data, end in _split(_without_mark(_chunks(source.path, on_bytes)), at, longest):
            if number > first:
                held += data
            # in front of a long document's first piece there is more than what may turn out to be no record
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
            # an empty line, or what follows the last separator, is no record
            if number > first and (
                start or (held and not held.isspace()) or not (source.is_json or separator)
            ):
                drawn.update(held if start else b"")
                share = draw(drawn) if start else 0.0
                undivided = bool(separator) and end is _End.OF_FILE and number == 1 and not source.is_json
                whole, held = bytes(held), bytearray()  # one of them is enough where it is large
                yield Record(index, number, whole, start, True, share, undivided)
                del whole
            number, start, tried = number + 1, 0, 0
            held, drawn = bytearray(), new_draw()


def new_draw() -> Any:
    """A hash to which a document's UTF-8 is given, all of it or in pieces, for `draw`."""
    return hashlib.blake2b(digest_size=8)


def draw(hashed: Any) -> float:
    """A number from 0 to 1 that depends on a document's text alone."""
    return int.from_bytes(hashed.digest(), "big") / (1 << 64)


class _End(enum.Enum):
    """What a document ends with."""

    SEPARATOR = enum.auto()
    OF_FILE = enum.auto()


def _parting(separator: str) -> tuple[re.Pattern[bytes] | None, int]:
    """What finds a separator, whatever ends the lines, and its greatest length in bytes."""
    if not separator:
        return None, 0
    lines = separator.replace("\r\n", "\n").encode("utf-8", "surrogateescape").split(b"\n")
    longest = sum(map(len, lines)) + 2 * (len(lines) - 1)
    return re.compile(rb"\r?\n".join(map(re.escape, lines))), longest


def _split(
    chunks: Iterator[bytes], at: re.Pattern[bytes] | None, longest: int
) -> Iterator[tuple[bytes, _End | None]]:
    """The bytes of each document as they come, and what it ends with if it does."""
    tail = b""
    for chunk in chunks:
        if at is None:
            yield chunk, None
            continue
        chunk, start = tail + chunk, 0
        for found in at.finditer(chunk):
            yield chunk[start : found.start()], _End.SEPARATOR
            start = found.end()
        sure = max(start, len(chunk) - longest + 1)  # a separator may lie across two chunks
        yield chunk[start:sure], None
        tail = chunk[sure:]
    yield tail, _End.OF_FILE


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """A file's bytes without the mark that some editors put in front of UTF-8."""
    yield next(chunks, b"").removeprefix(b"\xef\xbb\xbf")
    yield from chunks


def _chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """A file's bytes, decompressed, few at once. Raises TextError where it is damaged or ends too early."""
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
                except Exception as error:  # of three libraries
                    raise TextError(f"{path} is damaged: {error}. Get it anew or leave it out") from error
                raw = b""
                if stream.eof:  # what follows is another stream, or padding
                    raw, stream = stream.unused_data, None
    if stream is not None:
        raise TextError(f"{path} is truncated: its compressed data has no end. Get it anew or leave it out")


class _Stream(Protocol):
    """One compressed stream of a file. Little input can be much output: that comes in small parts."""

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
        # archives of texts are often packed with a window of 2 GiB
        self._engine = needed("zstandard").ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self.eof, self.unused_data = False, b""
        self._step = 1 << 6
        """Bytes of input that last gave about a chunk of output, which the library cannot be asked for."""

    def unpack(self, raw: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(raw) and not self._engine.eof:
            out = self._engine.decompress(raw[at : at + self._step])
            at += self._step
            self._step = max(16, min(2 * self._step, self._step * CHUNK // max(1, len(out)), CHUNK))
            yield out
        self.eof, self.unused_data = self._engine.eof, self._engine.unused_data + raw[at:]


def _unpacker(path: Path) -> Callable[[], _Stream] | None:
    """What begins with a stream of a file; None if it is not compressed."""
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
        found = value.get(text_field)
        if not isinstance(found, str):
            fields = files.encodable(", ".join(value))
            raise BadRecord("no text", f"no '{files.encodable(text_field)}' among the fields {fields}")
        text = found
        if _has_surrogate(text):
            raise BadRecord("bad UTF-8", "half of a surrogate pair")
        for name in ("id", "title"):
            if isinstance(each := value.get(name), str | int):
                about[name] = files.encodable(str(each))
    if is_blank(text):
        raise BadRecord("empty")
    return Document(text, about)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
