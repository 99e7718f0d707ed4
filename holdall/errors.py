"""Tells refusals, which a user can fix, from bugs.

A refusal is raised by a `raise` statement of Holdall or of a user's own mixer file, or comes from the
machine: a file that cannot be read or written, out of memory. Anything else, such as a TypeError from an
addition, is a bug, and its traceback is worth more than its message.
"""

from __future__ import annotations

import dis
from pathlib import Path
from types import TracebackType

from holdall.files import RunError

LOADED = "holdall_loaded_"
"""Prefix of the module names of users' own mixer files."""


def is_refusal(error: BaseException) -> bool:
    """Whether a user can fix this with the help of the message."""
    if isinstance(error, RunError | OSError | MemoryError) or _is_out_of_memory(error):
        return True
    return isinstance(error, KeyError | TypeError | ValueError | NotImplementedError) and _was_worded(error)


def message(error: BaseException) -> str:
    """The message of a refusal, in one line where possible."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = str(error).partition("\n")[0]
        return f"too little memory{f' ({first})' if first else ''}: choose smaller sizes, or fewer at once"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def loaded_line(error: BaseException) -> str:
    """The line of a user's own mixer file in which an error arose, as FILE:LINE; empty if there is none."""
    frames = list(filter(_is_loaded, _frames(error)))
    return f"{Path(frames[-1].tb_frame.f_code.co_filename)}:{frames[-1].tb_lineno}" if frames else ""


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or NumPy ran out of memory; recognised by name, since this module imports neither."""
    if type(error).__name__ in ("OutOfMemoryError", "_ArrayMemoryError"):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _was_worded(error: BaseException) -> bool:
    """Whether the innermost frame is at a `raise` statement of Holdall or of a user's mixer file."""
    frames = _frames(error)
    if not frames:
        return False
    code, at = frames[-1].tb_frame.f_code, frames[-1].tb_lasti
    ours = Path(__file__).parent in Path(code.co_filename).parents or _is_loaded(frames[-1])
    return ours and code.co_code[at] == dis.opmap["RAISE_VARARGS"]


def _is_loaded(frame: TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith(LOADED)


def _frames(error: BaseException) -> list[TracebackType]:
    frames, frame = [], error.__traceback__
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    return frames
