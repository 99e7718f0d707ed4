"""`holdall theory primitives`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich import box
from rich.table import Table

from holdall.commands import console
from holdall.report import primitives as picture
from holdall.theory.primitives import examples


def primitives(out: Path, dark: bool) -> int:
    """The command `holdall theory primitives`."""
    table = Table("primitive", "computes", "weights", "kernel", box=box.SIMPLE_HEAD, padding=(0, 1))
    for example in examples():
        layer = example.layer
        table.add_row(example.name, example.says, str(layer.nonzeros), str(layer.kernel))
    console.print(table)
    command = " ".join(["holdall", *sys.argv[1:]])
    console.print(f"  {picture.write(out, dark=dark, command=command)}", soft_wrap=True)
    return 0
