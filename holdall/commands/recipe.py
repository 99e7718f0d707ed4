"""`holdall recipe`."""

from __future__ import annotations

import re
from pathlib import Path

from rich import box
from rich.table import Table

from holdall import files, recipes
from holdall.commands import console
from holdall.recipes import SWEEPS, TEMPLATE


def show() -> int:
    """The command `holdall recipe list`."""
    table = Table("recipe", "trains", "flags", box=box.SIMPLE_HEAD, padding=(0, 1, 1, 1))
    for name, make in SWEEPS.items():
        flags = " ".join(f"--{setting}" for setting in recipes.takes(make))
        table.add_row(name, recipes.summary(name), flags)
    console.print(table)
    console.print("holdall frontier RECIPE --dry-run says what one would train here, and for how long.")
    return 0


def new(name: str) -> int:
    """The command `holdall recipe new`: write the template. Raises RunError if the file is there."""
    stem = re.sub(r"\W+", "_", name.removesuffix(".py")).strip("_").lower()
    if not stem:
        raise ValueError(f"{name!r} makes no file name: use letters")
    path = Path(f"{stem}.py")
    if path.exists() or path.is_symlink():
        raise files.RunError(f"{path} is there already; give another name")
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{file}", str(path)).replace("{name}", stem.replace("_", "-"))
    files.write_atomically(path, text.encode())
    console.print(f"wrote {path}; holdall frontier {path} --dry-run says what it would train", soft_wrap=True)
    return 0
