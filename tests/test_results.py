"""A finished sweep is taken over into a folder of results, whose README has its table."""

import shutil
from pathlib import Path

import pytest

from holdall import files
from holdall.report import table
from holdall.report.data import load
from tools import results

HELD = Path(__file__).parents[1] / "results" / "zoo"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A sweep's folder: the first three models of the zoo."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "environment.json"):
        shutil.copyfile(HELD / name, folder / name)
    lines = (HELD / "results.jsonl").read_text().splitlines(keepends=True)[:6]
    (folder / "results.jsonl").write_text("".join(lines))
    return folder


def test_a_sweep_is_copied_with_picture_and_table(run: Path, tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.mkdir()
    other = "| format | recall |\n| --- | ---: |\n| int4 | 0.5 |\n"
    old = "| model | width |\n| --- | ---: |\n| old | 64 |"
    (result / "README.md").write_text(f"# Title\n\n{old}\n\nwords\n\n{other}")
    results.take(run, result)
    shown, _ = table.render(load([run])).split("\n\n")
    assert (result / "README.md").read_text() == f"# Title\n\n{shown}\n\nwords\n\n{other}"
    assert sorted(path.name for path in result.iterdir()) == sorted([*results.COPIED, "README.md"])
    assert len(files.read_lines(result / "results.jsonl")) == 6
    results.take(run, result)  # again, over its own table
    assert (result / "README.md").read_text() == f"# Title\n\n{shown}\n\nwords\n\n{other}"


@pytest.mark.parametrize("page", ["no table", "| model |\n\n| model |\n\n"])
def test_a_page_without_a_place_for_the_table_is_refused_untouched(
    run: Path, tmp_path: Path, page: str
) -> None:
    (tmp_path / "README.md").write_text(page)
    with pytest.raises(ValueError, match="tables that begin with"):
        results.take(run, tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
