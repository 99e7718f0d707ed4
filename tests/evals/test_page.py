"""docs/evals.md: its code runs and prints what it says, and its table is that of the suites."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdall.evals import suites

PAGE = (Path(__file__).parents[2] / "docs" / "evals.md").read_text()


def test_its_code_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(code, "evals.md", "exec"), {})
    printed = capsys.readouterr().out
    assert f"prints\n\n```\n{printed}```\n" in PAGE


@pytest.mark.parametrize("suite", ["recall", "kv", "needles"])
def test_its_table_is_that_of_the_suites(suite: str) -> None:
    for task in suites.SUITES[suite]:
        file = f"`{task.file}`" if task.file else "-"
        assert f"| `{suite}` | `{task.name}` | {file} | {task.stands_for} | {task.differs} |\n" in PAGE
        if task.file:
            form = re.search(rf"\| [^|]*`{task.file}.jsonl`[^|]* \| `(.*)` \|\n", PAGE)
            assert form is not None
            assert form[1] == task.form


def test_every_suite_has_its_name_in_the_documentation() -> None:
    general = (Path(__file__).parents[2] / "docs" / "general-tasks.md").read_text()
    for suite in suites.SUITES:
        assert f"`{suite}`" in PAGE or f"--suite {suite}" in general, suite
