"""Files of corpora and tokenizers: what they may hold, or a TextError that names the file.

What a file says is data, never authority: none of its names is opened or removed unless it is one that
Holdall would have given.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from holdall import files
from holdall.files import RunError

CHUNK = 1 << 18
"""Bytes read at once."""


class TextError(RunError):
    """Something about texts, tokenizers or token shards that a user can mend; the message says how."""


@contextlib.contextmanager
def _of_text() -> Iterator[None]:
    try:
        yield
    except RunError as error:
        raise TextError(str(error)) from error.__cause__


def open_regular(path: Path, *, follow: bool = False) -> IO[bytes]:
    """`files.open_file`, whose error is a TextError."""
    with _of_text():
        return files.open_file(path, follow=follow)


def read_regular(path: Path, *, follow: bool = False) -> bytes:
    """`files.read_bytes`, whose error is a TextError."""
    with _of_text():
        return files.read_bytes(path, follow=follow)


def read_json(path: Path) -> dict[str, Any]:
    """`files.read_json` of an object, whose error is a TextError."""
    with _of_text():
        found: dict[str, Any] = files.read_json(path)
        return found


# ------------------------------------------------------------------------------------------------ forms


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """With a hash of all the rest, under the key "hash", so that a change of any part is seen."""
    rest = {key: value[key] for key in value if key != "hash"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "hash": hashlib.sha256(text.encode()).hexdigest()}


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
