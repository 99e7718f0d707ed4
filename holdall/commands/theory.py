"""The command group `holdall theory`: one function per subcommand, with its arguments.

What a subcommand computes and prints is in a file of its own, `theory_<topic>.py`, imported when it runs, so
that help is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tyro

from holdall import flags

app = tyro.extras.SubcommandApp()
ABOUT = "Theorems that run: circuits as BaseConv, models built by hand, messages, and lower bounds."


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Register a subcommand; its numbers must be in the ranges that its signature declares."""
    return app.command(flags.checked(function))


@command
def primitives(*, out: Path = Path("primitives.png"), dark: bool = False) -> int:
    """Draw what a layer of BaseConv can do by hand: shift, filter, write, multiply, and what each costs.

    Args:
        out: the picture.
        dark: draw on a dark background.
    """
    from holdall.commands import theory_circuits as shown

    return shown.primitives(out, dark)
