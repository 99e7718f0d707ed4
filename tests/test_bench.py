"""What the benchmarks write down; what they measure is measured by nobody's test."""

from pathlib import Path

import pytest
from rich.table import Table

from bench import markdown
from bench.__main__ import last

RESULTS = Path(__file__).parents[1] / "results"


def test_a_table_becomes_markdown() -> None:
    table = Table()
    table.add_column("what")
    table.add_column("ms", justify="right")
    table.add_row("ours", "0.1")
    table.add_row("theirs", "0.2\n0.3")
    assert markdown(table).splitlines() == [
        "| what | ms |", "| --- | ---: |", "| ours | 0.1 |", "| theirs | 0.2; 0.3 |",
    ]  # fmt: skip


@pytest.mark.parametrize("name", last(RESULTS / "bench.jsonl"))
def test_the_page_shows_the_newest_run(name: str) -> None:
    assert last(RESULTS / "bench.jsonl")[name] in (RESULTS / "bench.md").read_text()
