"""What the commands do and show in a terminal: live progress, tables, errors in one line.

A file for each group of commands, imported when one of them runs; this one knows nothing heavy.
"""

from __future__ import annotations

from rich.console import Console

from holdall.runs import RunError

console = Console(highlight=False)
USER_ERRORS = (RunError, KeyError, TypeError, ValueError, FileNotFoundError)
"""What a user can cause and mend; anything else is a fault of Holdall and keeps its traceback."""
TELL_SECONDS = 30.0
"""Between the lines of progress where nobody sees a bar move."""


def fail(error: Exception) -> int:
    """Say in one line what is wrong; returns the exit status."""
    message = error.args[0] if isinstance(error, KeyError) else str(error)
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    stderr.print("[bold red]error[/]", end=" ")
    stderr.print(message, markup=False)
    return 2


def resolve_device(device: str) -> str:
    """What "auto" means here. Raises ValueError if there is no such device."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("no CUDA device is available here; use --device cpu")
    return "cuda" if device != "cpu" and available else "cpu"
