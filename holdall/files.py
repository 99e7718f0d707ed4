"""Files and folders: the one place where Holdall reads, writes, locks and removes them.

A folder may come from somebody else. What lies in it is data, never authority:

    read        regular files only; the outcome is a value or a RunError that names file and way out. A pipe
                or a device is refused, not waited for
    write       beside the file, in a temporary folder, then put in its place in one step: readers and crashes
                find the old content or the new. A link is replaced, never followed
    append      to a regular file that is no link, whole lines only
    names       that a file gives are resolved inside its folder

Files get the mode that the umask allows. Nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import filelock
import numpy as np

LOCK = ".lock"


class RunError(Exception):
    """Something about a run or a file that its user can mend; the message says how, in one line.

    below: a line to show under it, such as one of a file.
    """

    def __init__(self, message: str, below: str = "") -> None:
        super().__init__("\n    ".join(map(printable, filter(None, (message, below)))))


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a RunError that names the path, the reason and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot write {path}: {reason}. Free some space or make the folder writable, then give the same "
            "command again: it resumes from the last checkpoint. Or choose another folder with --out."
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The path of what a file calls by name in its folder, which may have folders of its own.

    Raises RunError if the name, or a link on the way, leads out of the folder.
    """
    path = folder / name
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, or a name with a NUL byte
        within = False
    if not name or not within:
        raise RunError(f"{folder} names {name!r}, which is not inside of it: the folder is damaged or forged")
    return path


def make_folder(folder: Path) -> None:
    """Create a folder and those above it. Raises RunError with the reason if it cannot be."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


# ------------------------------------------------------------------------------------------------ words


def encodable(text: str) -> str:
    """A text as one that UTF-8 can hold; the only form in which names of files are written down.

    A byte of a file's name that is no UTF-8, which Python keeps as a lone surrogate, becomes \\xe9, and half
    of a surrogate pair \\ud83d. Any other text is left as it is.
    """
    return _SURROGATE.sub(_escaped, text)


def printable(text: str) -> str:
    """A text without what moves a terminal's cursor, breaks a line or cannot be encoded: that is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _escaped(letter: str | re.Match[str]) -> str:
    letter = letter if isinstance(letter, str) else letter[0]
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


# ---------------------------------------------------------------------------------------------- reading


def open_file(path: Path, way_out: str = "", *, follow: bool = False) -> IO[bytes]:
    """Open a regular file for reading. Raises RunError for anything else, and never waits for it.

    way_out: what the user can do about a file that cannot be read, as a sentence.
    follow: take the file that a link leads to. What lies in a run or a corpus is never a link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as error:
        raise RunError(_with(f"{path} is missing", way_out)) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
        if getattr(error, "errno", None) == errno.ELOOP:
            raise RunError(_with(f"{path} is a link; put the file itself there", way_out)) from error
        raise unreadable(path, error, way_out) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        what = "a folder, a device or a pipe is in its place"
        raise RunError(_with(f"{path} is no file that can be read: {what}", way_out))
    return os.fdopen(handle, "rb")


def unreadable(path: Path, error: Exception, way_out: str = "") -> RunError:
    """The error about a file that cannot be read."""
    return RunError(_with(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", way_out))


def damaged(what: object, reason: object, way_out: str = "") -> RunError:
    """The error about a file, or a line of one, that holds what it should not, in one line."""
    first = str(reason).strip().partition("\n")[0]
    return RunError(_with(f"{what} is damaged: {first}", way_out))


def _with(what: str, way_out: str) -> str:
    return f"{what.rstrip('.')}. {way_out}" if way_out else what


def read_bytes(path: Path, way_out: str = "", *, follow: bool = False) -> bytes:
    """All of a regular file. Raises RunError as `open_file`."""
    with open_file(path, way_out, follow=follow) as file:
        try:
            return file.read()
        except OSError as error:
            raise unreadable(path, error, way_out) from error


def read_json(path: Path, way_out: str = "", kind: type = dict) -> Any:
    """The object, or list, that a JSON file holds. Raises RunError if it holds anything else, or nothing."""
    return parse_json(read_bytes(path, way_out), path, way_out, kind)


def parse_json(
    data: bytes | str, where: object, way_out: str = "", kind: type = dict, *, constants: bool = False
) -> Any:
    """The object, or list, that JSON says; `where` is named if it says anything else, or nothing."""
    try:
        value = loads(data, constants=constants)
    except ValueError as error:
        raise damaged(where, f"it is no JSON ({error})", way_out) from error
    if not isinstance(value, kind):
        raise damaged(where, f"it holds no JSON {'object' if kind is dict else kind.__name__}", way_out)
    return value


def loads(data: bytes | str, *, constants: bool = False) -> Any:
    """Strict JSON: UTF-8, no key twice, no half of a surrogate pair, not nested beyond reason.

    constants: take NaN and Infinity, as Python writes them, too. Raises ValueError.
    """
    try:
        value = json.loads(
            data if isinstance(data, str) else data.decode(),
            parse_constant=None if constants else _no_constant,
            object_pairs_hook=_no_key_twice,
        )
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def read_lines(path: Path, way_out: str = "") -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a torn last line is left out. Empty if there is no file.

    Raises RunError, which names the line, if any other is broken.
    """
    if not path.exists() and not path.is_symlink():
        return []
    whole, _, _ = read_bytes(path, way_out).rpartition(b"\n")
    return [
        parse_json(line, f"line {number} of {path}", way_out or "Remove that line.", constants=True)
        for number, line in enumerate(whole.split(b"\n"), 1)
        if line.strip()
    ]


def read_arrays(path: Path, way_out: str = "") -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises RunError if it is damaged; nothing in it is ever unpickled."""
    with open_file(path, way_out) as file:
        if not zipfile.is_zipfile(file):
            raise damaged(path, "it is no .npz archive", way_out)
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        # all that zip, zlib and NumPy raise for bytes that are not theirs; a size that no memory has too
        except (
            OSError, ValueError, KeyError, EOFError, SyntaxError, TypeError, AttributeError, RuntimeError,
            MemoryError, OverflowError, zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            # NumPy's own words would advise to unpickle what somebody else has made
            reason = "it holds pickled objects" if "pickle" in str(error) else error or type(error).__name__
            raise damaged(path, reason, way_out) from error


# ---------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what was written replaces the file at `path` in one step.

    The path lies in a temporary folder beside the file, which goes whatever happens; what a killed process
    left goes with the next write.
    """
    with explained(path):
        remove_abandoned(path.parent)
        made = Path(tempfile.mkdtemp(prefix=".holdall-", dir=path.parent))
        with filelock.FileLock(made / LOCK):
            # only now others see it as a writer's folder: none finds it without its lock
            folder = made.rename(made.with_name(made.name + ".tmp"))
            try:
                temporary = folder / path.name
                with temporary.open("xb") as file:
                    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # as the umask allows
                yield temporary
                with temporary.open("rb+") as file:
                    os.fchmod(file.fileno(), mode)  # a library may have made another file, for us alone
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders of writers that were killed; a living writer holds its lock."""
    for left in folder.glob(".holdall-*.tmp"):
        with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(left / LOCK, timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader, or a crash, finds the old content or the new, nothing between."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a compressed .npz file, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line: all of it or nothing. What a crash tore before is removed first."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with _own_file(path) as file:
        end = _last_line_end(file)
        file.truncate(end)
        try:
            file.seek(end)
            while line:  # a disk that is nearly full takes a part first
                line = line[file.write(line) :]
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def size_on_disk(path: Path) -> int:
    """Bytes of a file that was appended to, all of which have reached the disk; 0 if there is none."""
    if not path.exists():
        return 0
    with _own_file(path) as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def shorten(path: Path, size: int) -> int:
    """Cut a file of lines back to its first `size` bytes, or, where it has fewer, to its whole lines.

    Returns how many of the `size` bytes are missing: a power cut may take lines that a checkpoint knows of.
    """
    if not path.exists():
        return size
    with _own_file(path) as file:
        file.truncate(min(size, os.fstat(file.fileno()).st_size))
        end = _last_line_end(file)
        file.truncate(end)
        return size - end


@contextlib.contextmanager
def _own_file(path: Path) -> Iterator[io.FileIO]:
    """A file to read and change in place, made if needed and locked meanwhile: regular, and no link.

    One that has other names (hard links, as backups make them) is copied first: those stay as they are.
    """
    with explained(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path, flags, 0o666)
        try:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise OSError(None, "it is not a regular file")
            if about.st_nlink > 1:
                write_atomically(path, path.read_bytes())
                os.close(handle)
                handle = os.open(path, flags)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            with io.FileIO(handle, "r+", closefd=False) as file:
                yield file
        finally:
            os.close(handle)


def _last_line_end(file: io.FileIO) -> int:
    """Where the last whole line of a file ends."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - (1 << 16))
        file.seek(start)
        piece = file.read(at - start) or b""
        if (found := piece.rfind(b"\n")) >= 0:
            return start + found + 1
        at = start
    return 0


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = 10.0) -> Iterator[None]:
    """Hold a run folder for this process alone; it is created if needed.

    The lock falls with the process, however that ends. What killed writers left in the folder is removed.
    Raises RunError if another process keeps the folder for longer than `patience` seconds.
    """
    make_folder(folder)
    lock = filelock.FileLock(folder / LOCK, timeout=patience)
    with explained(folder / LOCK):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"{folder} is in use by another run; wait for it or choose --out") from None
    try:
        remove_abandoned(folder)
        for pattern in (".*.tmp", ".tmp" + "[0-9A-Za-z]" * 6):  # as killed writers of version 0.1 left them
            for left in folder.glob(pattern):
                if left.is_file() or left.is_symlink():
                    left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
