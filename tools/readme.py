"""The README's list of rooms, written from their own docstrings: `make readme`; a test compares the two.

The order is that of the layers in pyproject.toml, from the command line down to files, which is the order in
which a reader meets them.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- rooms: written by `make readme` -->\n", "<!-- end of rooms -->\n"
COLUMN, WIDTH = 20, 112


def first_sentence(file: Path) -> str:
    """Of a module's docstring, without its period."""
    about = ast.get_docstring(ast.parse(file.read_text())) or ""
    paragraph = " ".join(about.partition("\n\n")[0].split())
    return re.split(r"\.(?= |$)", paragraph)[0]


def rooms() -> str:
    """One entry for each layer, as text of a code block."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (contract,) = settings["importlinter"]["contracts"]
    layers = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    lines = ["holdall/"]
    for layer in layers:
        path = ROOT.joinpath(*layer.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        name = f"  {path.name}{'/' if path.is_dir() else '.py'}"
        about = textwrap.wrap(first_sentence(file), WIDTH - COLUMN)
        lines += [
            f"{head:{COLUMN}}{line}" for head, line in zip([name, *[""] * len(about)], about, strict=False)
        ]
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README with its list of rooms as the code has it; ValueError if the marks around it are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no list of rooms between '{BEGIN.strip()}' and '{END.strip()}'")
    return f"{before}{BEGIN}```\n{rooms()}\n```\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
