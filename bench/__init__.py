"""Speed beside what it is to be compared with, measured on the machine at hand."""

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def show(name: str, results: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], Table]) -> None:
    """Print results as a table, and as one JSON document on the last line."""
    Console().print(table(results))
    print(json.dumps({"bench": name, "results": results}))


def markdown(table: Table) -> str:
    """A table of rich's as Markdown, as results/bench.md has it."""
    heads = [str(column.header) for column in table.columns]
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    return "\n".join(f"| {' | '.join(row)} |".replace("\n", "; ") for row in (heads, rule, *rows))
