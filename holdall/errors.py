"""Which errors are a refusal, that a user can mend, and which are a fault of the program.

A refusal was put into words by a `raise` of Holdall or of a user's own mixer file, or it is the machine's: a
file that cannot be read or written, too little memory. Anything else, such as the TypeError of an addition
somewhere inside, is a fault, and its traceback is worth more than its message.
"""

from __future__ import annotations

import dis
from pathlib import Path
from types import TracebackType

from holdall.files import RunError

LOADED = "holdall_loaded_"
"""How the names of the modules begin that a user's own mixer files become."""


def is_refusal(error: BaseException) -> bool:
    """Whether a user can mend this by what the message says."""
    if isinstance(error, RunError | OSError | MemoryError) or _is_out_of_memory(error):
        return True
    return isinstance(error, KeyError | TypeError | ValueError | NotImplementedError) and _was_worded(error)


def message(error: BaseException) -> str:
    """What a refusal says, in one line where it can."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = str(error).partition("\n")[0]
        return f"too little memory{f' ({first})' if first else ''}: choose smaller sizes, or fewer at once"
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return said or type(error).__name__


def loaded_line(error: BaseException) -> str:
    """The line of a user's own mixer file in which an error arose, as FILE:LINE; empty if in none."""
    frames = list(filter(_is_loaded, _frames(error)))
    return f"{Path(frames[-1].tb_frame.f_code.co_filename)}:{frames[-1].tb_lineno}" if frames else ""


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's, of a GPU or of the machine; by name, since this imports no PyTorch."""
    if type(error).__name__ in ("OutOfMemoryError", "_ArrayMemoryError"):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _was_worded(error: BaseException) -> bool:
    """Whether a `raise` statement of Holdall or of a user's mixer file made it, at the innermost place."""
    frames = _frames(error)
    if not frames:
        return False
    code, at = frames[-1].tb_frame.f_code, frames[-1].tb_lasti
    ours = Path(__file__).parent in Path(code.co_filename).parents or _is_loaded(frames[-1])
    return ours and code.co_code[at] == dis.opmap["RAISE_VARARGS"]


def _is_loaded(frame: TracebackType) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).startswith(LOADED)


def _frames(error: BaseException) -> list[TracebackType]:
    frames, each = [], error.__traceback__
    while each is not None:
        frames.append(each)
        each = each.tb_next
    return frames
