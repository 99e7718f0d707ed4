"""The commands and their terminal output: progress bars, tables, one-line errors.

There is one file per group of commands, imported when one of them runs; this one imports nothing heavy.

Printed strings are never parsed as Rich's markup, and control characters are escaped, since paths, labels and
texts come from files and users. Styles are given by `rich.text.Text`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.control import strip_control_codes
from rich.progress import TextColumn
from rich.segment import Segment
from rich.text import Text

from holdall import errors, files

TELL_SECONDS = 30.0
"""Seconds between progress lines where the output is not a terminal."""
OUT_OF_TIME = 75
"""Exit status if a time limit ended a command: sysexits.h's "try again later"."""
TRACEBACK = "HOLDALL_TRACEBACK"
"""Environment variable: if set, refusals are shown with their traceback."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")
"""Control characters except tab and newline, and surrogates, as in file names that are not UTF-8."""


def typed_command() -> str:
    """The command as it was typed, which results and pictures hold beside the commit."""
    return " ".join(["holdall", *sys.argv[1:]])


def printable(text: str) -> str:
    """A string with control characters and surrogates escaped, line breaks excepted.

    Those that Rich itself removes from text (bell, backspace, carriage return and the like) are removed.
    """
    return UNPRINTABLE.sub(lambda match: files.printable(match[0]), strip_control_codes(text))


class PlainConsole(Console):
    """A console that does not interpret markup, and escapes control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            clean = segment.control or not UNPRINTABLE.search(segment.text)
            yield segment if clean else Segment(printable(segment.text), segment.style)


class Words(TextColumn):
    """A text column of a progress bar, without markup."""

    def __init__(self, text: str, **options: Any) -> None:
        super().__init__(text, markup=False, **options)


console = PlainConsole()


@contextlib.contextmanager
def busy(text: str = "") -> Iterator[Callable[[str], None]]:
    """A status line while something is computed; yields a function that changes its text."""
    with console.status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


def guarded(command: Callable[[], Any]) -> Any:
    """Run a command; returns its result, or the exit status of its error (`failed`)."""
    try:
        return command()
    except BrokenPipeError:  # the reader closed the pipe; the caller handles it
        raise
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> int:
    """Print the error that ended a command: one line for a refusal, a traceback and versions for a bug.

    Returns the exit status: 2 for what a user can fix, 1 for a bug.
    """
    stderr = PlainConsole(stderr=True, soft_wrap=True)
    refusal = errors.is_refusal(error)
    if not refusal or os.environ.get(TRACEBACK, "0") not in ("", "0"):
        stderr.print("".join(traceback.format_exception(error)), end="")
    if refusal:
        stderr.print(Text.assemble(("error", "bold red"), " ", errors.message(error)))
        return 2
    if where := errors.loaded_line(error):
        stderr.print(Text.assemble(("error", "bold red"), f" in your mixer file, {where}: {error}"))
        return 2
    versions = [f"Python {platform.python_version()}", platform.platform()]
    for name in ("torch", "holdall"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.insert(0, f"{name} {metadata.version(name)}")
    stderr.print(
        Text.assemble(
            ("This is a bug in Holdall", "bold red"),
            ", not in your command. Please report it with the lines above, the command "
            f"({typed_command()}) and: {', '.join(versions)}.",
        )
    )
    return 1


def resolve_device(device: str) -> str:
    """The device for "auto", "cpu" or "cuda". Raises ValueError if there is no such device."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("no CUDA device is available here; use --device cpu")
    return "cuda" if device != "cpu" and available else "cpu"
