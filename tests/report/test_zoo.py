"""The zoo's page: every mixer is on it, with the numbers of its runs."""

import json
from pathlib import Path

import pytest

from holdall import mixers
from holdall.report import zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(make_sweep, line):
    lines = [
        line("attention", 49_672, 0.9, mixer="attention", learning_rate=0.004, parameters=12_345),
        line("attention", 49_672, 0.998, mixer="attention", learning_rate=0.008, parameters=12_345),
        line("mamba", 4096, None, mixer="mamba"),
    ]
    found = make_sweep("zoo", lines)
    drifts = [
        {"mixer": "attention", "dtype": "float32", "width": 64, "length": 16_384, "seconds": 1.5}
        | {"error": 1.234e-7, "last": 1e-7},
        {"mixer": "attention", "dtype": "bfloat16", "width": 64, "length": 16_384, "seconds": 1.5}
        | {"error": 0.0041, "last": 0.004},
    ]
    (found / "soundness.jsonl").write_text("".join(json.dumps(each) + "\n" for each in drifts))
    return found


def row(page: str, start: str, column: str) -> dict[str, str]:
    """The cells of the one line that starts so, in the table that has this column."""
    lines = page.splitlines()
    (at,) = [i for i, text in enumerate(lines) if text.startswith(f"| {start}") and column in head(lines, i)]
    names, cells = (
        [cell.strip() for cell in text.strip("| ").split(" | ")] for text in (head(lines, at), lines[at])
    )
    return dict(zip(names, cells, strict=True))


def head(lines: list[str], at: int) -> str:
    return next(lines[i - 1] for i in range(at, 0, -1) if lines[i].startswith("| ---"))


def test_every_mixer_is_there_once_in_its_family(folder):
    page = zoo.markdown(folder)
    for family, members in mixers.families().items():
        section = page.partition(f"## {family[0].upper()}{family[1:]}\n")[2].partition("\n## ")[0]
        for name in members:
            assert section.count(f"| `{name}`") == 2, name
            assert (
                row(page, f"`{name}`", "one more")["state elements after N tokens"]
                == mixers.entry(name).state
            )


def test_numbers_are_those_of_the_best_run(folder):
    page = zoo.markdown(folder)
    cells = row(page, "`attention`", "recall")
    assert (cells["recall"], cells["state"], cells["parameters"]) == ("99.8%", "48.5 KiB", "12,345")
    assert (cells["error fp32"], cells["error bf16"]) == ("1e-07", "4e-03")
    assert row(page, "`mamba`", "recall")["recall"] == "diverged"
    assert row(page, "`hyena`", "recall")["recall"] == "-"
    assert "hyena" in page.rpartition("Not measured yet: ")[2]
    assert "attention" not in page.rpartition("Not measured yet: ")[2].split(", ")


def test_what_is_not_causal_says_so(folder):
    page = zoo.markdown(folder)
    for name in mixers.names():
        assert (f"`{name}` (not causal)" in page) == (not mixers.entry(name).causal)


def test_the_page_is_written_whole(folder, tmp_path):
    target = zoo.write(folder, tmp_path / "docs" / "zoo.md")
    assert target.read_text() == zoo.markdown(folder)
    assert [path.name for path in target.parent.iterdir()] == ["zoo.md"]


def test_beside_the_package_each_mixer_is_linked_to_its_file(folder, tmp_path):
    assert "holdall/mixers/" not in zoo.markdown(folder)
    (tmp_path / "holdall" / "mixers").mkdir(parents=True)
    page = zoo.write(folder, tmp_path / "docs" / "zoo.md").read_text()
    for name in mixers.names():
        file = mixers.entry(name).file
        assert f"](../{file}) |" in row(page, f"`{name}`", "what it is")["what it is"] + " |"
        assert (ROOT / file).is_file()


def test_the_page_in_the_docs_is_that_of_its_results():
    page = (ROOT / "docs" / "zoo.md").read_text()
    assert page == zoo.markdown(ROOT / "results" / "zoo", package="../"), (
        "docs/zoo.md is old: run `holdall zoo --results results/zoo --page docs/zoo.md`"
    )
