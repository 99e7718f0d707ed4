"""Take a finished sweep over into results/: `python -m tools.results runs/quick results/quick`.

Copies what a report is made from and the picture, and writes the table into the folder's README in place of
the one that stands there. What the README says in words is for a person to check.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from holdall import report
from holdall.report import table
from holdall.report.data import load

COPIED = ("config.json", "environment.json", "results.jsonl", "frontier.png")
IF_THERE = ("orders.png",)  # of set disjointness alone
TABLE = re.compile(r"^\| model \|.*?(?=\n\n)", flags=re.M | re.S)


def take(run: Path, result: Path) -> None:
    """Copy the sweep of `run` into `result`, whose README shows its table afterwards.

    Raises ValueError unless the README has exactly one table of models, RunError if there is no sweep.
    """
    readme = result / "README.md"
    page = readme.read_text()
    if len(found := TABLE.findall(page)) != 1:
        raise ValueError(f"{readme} has {len(found)} tables that begin with '| model |', not 1")
    shown, _ = table.render(load([run])).split("\n\n")
    report.write([run], run)
    for name in (*COPIED, *(name for name in IF_THERE if (run / name).exists())):
        shutil.copyfile(run / name, result / name)
    readme.write_text(TABLE.sub(lambda _: shown, page))


if __name__ == "__main__":
    take(*map(Path, sys.argv[1:]))
