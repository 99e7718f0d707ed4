"""Speed beside what it is to be compared with, measured on the machine at hand."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from holdall.report import table as tables


def collected(results: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """What a run measures, and whether that is all of it: Control-C ends it with what there is by then."""
    found = []
    try:
        for result in results:
            found.append(result)
    except KeyboardInterrupt:
        if not found:
            raise
        return found, False
    return found, True


def show(name: str, results: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], Table]) -> None:
    """Print results as a table, and as one JSON document on the last line."""
    Console().print(table(results))
    print(json.dumps({"bench": name, "results": results}))


def markdown(table: Table) -> str:
    """A table of rich's as Markdown, as results/bench.md has it."""
    columns = [[str(cell).replace("\n", "; ") for cell in column.cells] for column in table.columns]
    text = [index for index, column in enumerate(table.columns) if column.justify != "right"]
    heads = [str(column.header) for column in table.columns]
    return tables.markdown(heads, zip(*columns, strict=True), text)
