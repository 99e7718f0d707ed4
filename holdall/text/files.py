"""Files of corpora and tokenizers, checked on reading; errors are TextErrors that name the file.

Their content is untrusted: a name given in a file is opened or removed only if Holdall would have chosen it.
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
"""Bytes per read."""


class TextError(RunError):
    """A problem with text files, tokenizers or token shards that a user can fix; the message says how."""


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
        value: dict[str, Any] = files.read_json(path)
        return value


# ------------------------------------------------------------------------------------------------ forms


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a hash of all its other keys added under "hash", by which changes are detected."""
    rest = {key: value[key] for key in value if key != "hash"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "hash": hashlib.sha256(text.encode()).hexdigest()}


def check(value: Any, form: Any, where: str = "it") -> None:
    """Raise ValueError, which says where, unless a JSON value matches a schema.

    A schema is a predicate, a list with one schema for all elements, or a mapping from required keys to their
    schemas; under the key `...` stands the schema of all other keys, which are unchecked without it.
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        for index, element in enumerate(value):
            check(element, form[0], f"{where}[{index}]")
    elif isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        for key in form:
            if key is not ... and key not in value:
                raise ValueError(f"{where} has no '{key}'")
        for key, element in value.items():
            if (wanted := form.get(key, form.get(...))) is not None:
                check(element, wanted, f"{where} '{key}'" if where != "it" else f"'{key}'")
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
    """The header of a .npy file of one dimension."""
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
            shape, fortran, file_dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # NumPy's header parser raises many kinds
            raise TextError(f"{path} is damaged: it does not begin like a .npy file") from error
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if file_dtype != dtype or shape != (count,) or fortran:
            raise TextError(
                f"{path} was altered: it holds {file_dtype} of shape {shape}, not the {count:,} values of "
                f"{dtype} that the manifest counts"
            )
        if size != start + count * dtype.itemsize:
            raise TextError(f"{path} is damaged: its {size:,} bytes do not hold {count:,} values of {dtype}")
        return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=(count,))
