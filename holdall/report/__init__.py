"""Tables, figures and pages, made from sweep folders alone.

from holdall.report import write
write([Path("runs/quick")], Path("runs/quick"))     # frontier.png and frontier.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from holdall.report import figure, page
from holdall.report.data import load
from holdall.report.style import FILLS

__all__ = ["write"]


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write frontier.png and frontier.html into `out` from the sweeps in `folders`; return their paths.

    Cheap enough to call after every trained model, and a reader never sees half a file. Several sweeps
    share one picture if they took the same test: the first is filled, the others are open or marked.
    Raises FileNotFoundError or ValueError, naming the folder and the way out, where there is nothing to
    draw from.
    """
    if len(folders) > len(FILLS):
        raise ValueError(
            f"{len(folders)} sweeps on one picture cannot be told apart; name at most {len(FILLS)}"
        )
    sweeps = load(folders)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, save in (("frontier.png", figure.save), ("frontier.html", page.save)):
        target = out / name
        unfinished = out / f".{name}.{os.getpid()}"
        try:
            save(sweeps, unfinished)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        written.append(target)
    return written
