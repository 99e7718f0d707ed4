"""What the commands do and show in a terminal: live progress, tables, errors in one line.

A file for each group of commands, imported when one of them runs; this one knows nothing heavy.

Nothing that is printed is taken for Rich's markup, and no control character reaches the terminal: paths,
labels and texts come from files and users. Style is given by `rich.text.Text`.
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
"""Between the lines of progress where nobody sees a bar move."""
TRACEBACK = "HOLDALL_TRACEBACK"
"""The environment variable that shows the traceback of what is otherwise one line."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")
"""Control characters but tab and newline, and what stands for bytes of a file name that are no text."""


def printable(text: str) -> str:
    """A text with what would steer the terminal, or is no text, escaped; its lines stay lines.

    Rich drops some of it wherever it makes a text of a string (bell, backspace, carriage return and alike).
    """
    return UNPRINTABLE.sub(lambda found: files.printable(found[0]), strip_control_codes(text))


class PlainConsole(Console):
    """A console that prints text as it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            clean = segment.control or not UNPRINTABLE.search(segment.text)
            yield segment if clean else Segment(printable(segment.text), segment.style)


class Words(TextColumn):
    """A column of a progress bar that prints text as it is."""

    def __init__(self, text: str, **options: Any) -> None:
        super().__init__(text, markup=False, **options)


console = PlainConsole()


@contextlib.contextmanager
def busy(text: str = "") -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; gives the function that changes it."""
    with console.status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


def guarded(command: Callable[[], Any]) -> Any:
    """What a command returns, or what `failed` does with its error."""
    try:
        return command()
    except BrokenPipeError:  # whoever reads has seen enough, which the caller knows to end
        raise
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> int:
    """Say what ended a command: of a refusal its one line, of a fault all that helps to mend it.

    Returns the exit status: 2 for what a user can mend, 1 for a fault.
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
            ("This is a fault of Holdall", "bold red"),
            ", not of what you typed. Please report it with the lines above, the command "
            f"({' '.join(['holdall', *sys.argv[1:]])}) and: {', '.join(versions)}.",
        )
    )
    return 1


def resolve_device(device: str) -> str:
    """What "auto" means here. Raises ValueError if there is no such device."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("no CUDA device is available here; use --device cpu")
    return "cuda" if device != "cpu" and available else "cpu"
