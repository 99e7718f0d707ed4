"""Files and folders: the one place where Holdall reads, writes, locks and removes them.

A folder may come from somebody else, so its content is untrusted data:

    read        regular files only; the result is a value, or a RunError that names the file and the remedy. A
                pipe or a device is refused, since reading it could block
    write       into a temporary folder beside the file, then renamed over it: readers and crashes see the old
                content or the new, never a mixture. A symbolic link is replaced, never followed
    append      whole lines, to a regular file that is not a symbolic link
    names       given in a file are resolved inside that file's folder

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
    """A problem with a run or a file that its user can fix; the message says how, in one line.

    below: a line to show under the message, such as the line of a file that is wrong.
    """

    def __init__(self, message: str, below: str = "") -> None:
        super().__init__("\n    ".join(map(printable, filter(None, (message, below)))))


class InUse(RunError):  # noqa: N818 - the one who waits is not at fault
    """Another process holds a folder's lock."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError into a RunError that names the path, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot write {path}: {reason}. Free some space or make the folder writable, then give the same "
            "command again: it resumes from the last checkpoint. Or choose another folder with --out."
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file in `folder`, or below it, that another file names.

    Raises RunError if the name, or a symbolic link on the way, leads out of the folder.
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
    """Create a folder and its parents. Raises RunError with the reason if that fails."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


# ------------------------------------------------------------------------------------------------ words


def encodable(text: str) -> str:
    """A string that UTF-8 can encode; file names are stored in this form only.

    A byte of a file name that is not UTF-8, which Python represents as a lone surrogate, becomes \\xe9, and
    half of a surrogate pair \\ud83d. Any other string is unchanged.
    """
    return _SURROGATE.sub(_escaped, text)


def printable(text: str) -> str:
    """A string with control characters, line breaks and lone surrogates escaped, safe for a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _escaped(letter: str | re.Match[str]) -> str:
    letter = letter if isinstance(letter, str) else letter[0]
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


# ---------------------------------------------------------------------------------------------- reading


def open_file(path: Path, way_out: str = "", *, follow: bool = False) -> IO[bytes]:
    """Open a regular file for reading. Raises RunError for anything else, without blocking on it.

    way_out: what the user can do about a file that cannot be read, as a sentence.
    follow: follow symbolic links. The files of a run or a corpus are never links.
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
        raise RunError(_with(f"{path} is not a readable file: {what}", way_out))
    return os.fdopen(handle, "rb")


def unreadable(path: Path, error: Exception, way_out: str = "") -> RunError:
    """The error about a file that cannot be read."""
    return RunError(_with(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", way_out))


def damaged(what: object, reason: object, way_out: str = "") -> RunError:
    """The error about a file, or a line of one, with wrong content; its message is one line."""
    first = str(reason).strip().partition("\n")[0]
    return RunError(_with(f"{what} is damaged: {first}", way_out))


def _with(what: str, way_out: str) -> str:
    return f"{what.rstrip('.')}. {way_out}" if way_out else what


def read_bytes(path: Path, way_out: str = "", *, follow: bool = False) -> bytes:
    """The content of a regular file. Raises RunError as `open_file` does."""
    with open_file(path, way_out, follow=follow) as file:
        try:
            return file.read()
        except OSError as error:
            raise unreadable(path, error, way_out) from error


def read_json(path: Path, way_out: str = "", kind: type = dict) -> Any:
    """The object (or list) in a JSON file. Raises RunError if the file holds anything else, or nothing."""
    return parse_json(read_bytes(path, way_out), path, way_out, kind)


def parse_json(
    data: bytes | str, where: object, way_out: str = "", kind: type = dict, *, constants: bool = False
) -> Any:
    """The object (or list) in a JSON text. Raises RunError, which names `where`, for anything else."""
    try:
        value = loads(data, constants=constants)
    except ValueError as error:
        raise damaged(where, f"it is not JSON ({error})", way_out) from error
    if not isinstance(value, kind):
        raise damaged(
            where, f"it does not hold a JSON {'object' if kind is dict else kind.__name__}", way_out
        )
    return value


def loads(data: bytes | str, *, constants: bool = False) -> Any:
    """Strict JSON: UTF-8, no repeated key, no lone surrogate, nesting within Python's recursion limit.

    constants: also accept NaN and Infinity, as Python writes them. Raises ValueError.
    """
    try:
        value = json.loads(
            data if isinstance(data, str) else data.decode(),
            parse_constant=None if constants else _no_constant,
            object_pairs_hook=_no_key_twice,
        )
        json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def read_lines(path: Path, way_out: str = "") -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without an incomplete last line. Empty if there is no file.

    Raises RunError, which names the line, if any other line is broken.
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
            raise damaged(path, "it is not an .npz archive", way_out)
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        # everything that zip, zlib and NumPy raise for malformed bytes, a size beyond all memory included
        except (
            OSError, ValueError, KeyError, EOFError, SyntaxError, TypeError, AttributeError, RuntimeError,
            MemoryError, OverflowError, zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            # NumPy's message would advise unpickling an untrusted file
            reason = "it holds pickled objects" if "pickle" in str(error) else error or type(error).__name__
            raise damaged(path, reason, way_out) from error


# ---------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file written there replaces the one at `path` atomically.

    It lies in a temporary folder beside `path`, which is removed in any case; the one that a killed process
    left is removed by the next write.
    """
    with explained(path), _temporary_beside(path) as folder:
        temporary = folder / path.name
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # as the umask allows
        yield temporary
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), mode)  # a library may have made another file, for us alone
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def new_folder(path: Path, way_out: str = "") -> Iterator[Path]:
    """A folder to fill; with all that was written it comes to `path` in one step, or nothing does.

    Raises RunError, before anything is written, if something is at `path` already but an empty folder.
    """
    with explained(path):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            raise RunError(_with(f"{path} is there already, and is not a folder", way_out))
        if path.is_dir() and (there := sorted(os.listdir(path))):
            raise RunError(_with(f"{path} holds something already: {there[0]}", way_out))
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_beside(path) as folder:
            made = folder / path.name
            made.mkdir()
            yield made
            made.replace(path)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `path`, locked against `remove_abandoned` while it is used."""
    remove_abandoned(path.parent)
    made = Path(tempfile.mkdtemp(prefix=".holdall-", dir=path.parent))
    with filelock.FileLock(made / LOCK):
        # only now others see it as a writer's folder: none finds it without its lock
        folder = made.rename(made.with_name(made.name + ".tmp"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders of killed writers; a running writer holds its lock."""
    for abandoned in folder.glob(".holdall-*.tmp"):
        lock = filelock.FileLock(abandoned / LOCK, timeout=0)
        with contextlib.suppress(OSError, filelock.Timeout), lock:
            shutil.rmtree(abandoned, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file atomically: a reader, or a crash, sees the old content or the new, never a mixture."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a compressed .npz file, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line, all or nothing. An incomplete line that a crash left is removed first."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with _own_file(path) as file:
        end = _last_line_end(file)
        file.truncate(end)
        try:
            file.seek(end)
            while line:  # a nearly full disk may accept only a part
                line = line[file.write(line) :]
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def size_on_disk(path: Path) -> int:
    """Size of a file in bytes after flushing it to disk; 0 if there is no file."""
    if not path.exists():
        return 0
    with _own_file(path) as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def shorten(path: Path, size: int) -> int:
    """Truncate a file of lines to its first `size` bytes or, if it is shorter, to its complete lines.

    Returns how many of the `size` bytes are missing: a power failure may lose lines that a checkpoint counts.
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
    """A regular file, opened to be changed in place, created if needed and locked meanwhile.

    A file with several hard links, as backups make them, is copied first, so that the others do not change.
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
    """The offset at which the last complete line of a file ends."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - (1 << 16))
        file.seek(start)
        piece = file.read(at - start) or b""
        if (newline := piece.rfind(b"\n")) >= 0:
            return start + newline + 1
        at = start
    return 0


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = 10.0) -> Iterator[None]:
    """Lock a run folder for this process, creating it if needed.

    The lock is released when the process ends, even if it is killed. Temporary files of killed writers are
    removed. Raises InUse if another process holds the lock for longer than `patience` seconds.
    """
    make_folder(folder)
    lock = filelock.FileLock(folder / LOCK, timeout=patience)
    with explained(folder / LOCK):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InUse(f"{folder} is in use by another run; wait for it or choose --out") from None
    try:
        remove_abandoned(folder)
        for pattern in (".*.tmp", ".tmp" + "[0-9A-Za-z]" * 6):  # temporary files of version 0.1
            for left in folder.glob(pattern):
                if left.is_file() or left.is_symlink():
                    left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
