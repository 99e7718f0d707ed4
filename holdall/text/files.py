"""Files that somebody else may have made: regular files, strict JSON, strict arrays, or refused by name.

What a file says is data, never authority: none of its names is opened or removed unless it is one that
Holdall would have given, and nothing of it moves a terminal's cursor.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from holdall.runs import RunError

CHUNK = 1 << 18
"""Bytes read at once."""


class TextError(RunError):
    """Something about texts, tokenizers or token shards that a user can mend; the message says how."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


# ------------------------------------------------------------------------------------------------ names


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


# ------------------------------------------------------------------------------------------------ opening


def open_regular(path: Path, *, follow: bool = False) -> BinaryIO:
    """A regular file, opened for reading. Raises TextError for anything else, and never waits for it.

    follow: take the file that a link leads to; what lies in a corpus is never a link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise TextError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise TextError(f"{path} is a link; put the file itself there") from None
        raise TextError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TextError(f"{path} is no file that can be read: a folder, a device or a pipe is in its place")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, follow: bool = False) -> bytes:
    """All of a regular file. Raises TextError."""
    with open_regular(path, follow=follow) as file:
        try:
            return file.read()
        except OSError as error:
            raise TextError(f"cannot read {path}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------ JSON


def parse_json(data: bytes | str) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no key twice, not nested beyond reason. Raises ValueError."""
    try:
        return json.loads(
            data if isinstance(data, str) else data.decode(),
            parse_constant=_no_constant,
            object_pairs_hook=_no_key_twice,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises TextError."""
    try:
        return parse_json(read_regular(path))
    except ValueError as error:
        raise TextError(f"{path} is damaged ({error})") from error


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """With a hash of all the rest, under the key "hash", so that a change of any part is seen."""
    rest = {key: value[key] for key in value if key != "hash"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "hash": hashlib.sha256(text.encode()).hexdigest()}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def check(value: Any, form: Any, where: str = "it") -> None:
    """Raise ValueError, which says where, unless a JSON value has a form.

    A form is a function that says yes or no, a list of one form for all elements, or a mapping of the keys
    that must be there to their forms; under the key `...` is that of all others, which else may be anything.
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        for index, each in enumerate(value):
            check(each, form[0], f"{where}[{index}]")
    elif isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        for key in form:
            if key is not ... and key not in value:
                raise ValueError(f"{where} has no '{key}'")
        for key, each in value.items():
            if (wanted := form.get(key, form.get(...))) is not None:
                check(each, wanted, f"{where} '{key}'" if where != "it" else f"'{key}'")
    elif not form(value):
        raise ValueError(f"{where} is {str(value)[:40]!r}")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


# ------------------------------------------------------------------------------------------------ arrays


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """What stands in front of the values in a .npy file of one dimension."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    )
    return file.getvalue()


def open_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """The `count` values of a .npy file, memory-mapped. Raises TextError if it holds anything else."""
    with open_regular(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"its version is {version}")
            shape, fortran, held = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # NumPy's parser of headers raises many kinds
            raise TextError(f"{path} is damaged: its beginning is none of a .npy file") from error
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if held != dtype or shape != (count,) or fortran:
            raise TextError(
                f"{path} was altered: it holds {held} of shape {shape}, not the {count:,} values of {dtype} "
                "that the manifest counts"
            )
        if size != start + count * dtype.itemsize:
            raise TextError(f"{path} is damaged: its {size:,} bytes do not hold {count:,} values of {dtype}")
        return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=(count,))
