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
