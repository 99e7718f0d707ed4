"""Models that break laws, or were published and not trained here: every report shows which they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from holdall import files
from holdall.report import chart, figure, page, table, widths
from holdall.report.data import Sweep, load, pareto

CONFIG = {
    "recipe": "quick", "command": "holdall frontier quick", "context_len": 64, "difficulty": "pairs",
    "test": [{"vocab": 64, "length": 64, "rows": 10, "difficulty": 4, "values": 32, "questions": 4}],
}  # fmt: skip
SOURCE = {"commit": "abcdef", "hardware": "NVIDIA H200"}


def line(label: str, state_bytes: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label, "family": label, "mixer": label, "width": 64, "state_bytes": state_bytes, "seed": 0,
        "accuracy": accuracy, "accuracy_by_difficulty": {"4": accuracy}, "learning_rate": 0.01, **more,
    }  # fmt: skip


@pytest.fixture
def sweeps(tmp_path: Path) -> tuple[Sweep, ...]:
    lines = [
        line("attention", 4096, 0.9, published=SOURCE),
        line("mine", 2048, 0.5),
        line("leaky", 1024, 0.8, laws={"broken": {"causal": "it sees the future"}}),
        line("liar", 16, 0.99, laws={"broken": {"state_size": "64 elements are carried, not 4"}}),
        line("whole", 512, 0.2, laws={"refused": {"splits": "it reads the whole"}}),
    ]
    files.write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return load([tmp_path])


def by_gid(axes: Any, gid: str) -> list[tuple[float, float]]:
    return [
        point
        for artist in axes.lines
        if artist.get_gid() == gid
        for point in zip(*artist.get_data(), strict=True)
    ]


def test_a_state_that_is_not_counted_is_not_drawn(sweeps: tuple[Sweep, ...]) -> None:
    drawn = figure.draw(sweeps)
    (axes,) = drawn.axes
    points = {tuple(point) for artist in axes.lines for point in zip(*artist.get_data(), strict=True)}
    assert (16, 0.99) not in points
    footer = [text.get_text() for text in drawn.texts if text.get_gid() == "footer"]
    assert "Not drawn, as its state is not what it reports: liar." in footer
    assert any("liar" in note and "no place on the picture" in note for note in sweeps[0].notes)
    assert all(
        16 not in trace.get("x", ()) for trace in chart.traces(sweeps, chart.Marks()) if trace.get("meta")
    )


def test_a_mixer_that_breaks_a_law_is_ringed_and_not_on_the_frontier(sweeps: tuple[Sweep, ...]) -> None:
    (axes,) = figure.draw(sweeps).axes
    assert by_gid(axes, "broken") == [(1024, 0.8)]
    assert [model.label for model in pareto(sweeps[0].models)] == ["whole", "mine", "attention"]
    labels = {text.get_text() for text in axes.texts if text.get_gid() == "label"}
    assert any("breaks causal" in label for label in labels)
    assert any("refuses splits" in label for label in labels)
    text = table.render(sweeps)
    assert "| leaky ✗ causal |" in text
    assert "| liar ✗ state_size |" in text
    assert "| whole refuses splits |" in text
    assert "✗: breaks this law" in text


def test_what_was_published_is_pale_and_says_where_it_was_trained(sweeps: tuple[Sweep, ...]) -> None:
    drawn = figure.draw(sweeps)
    (axes,) = drawn.axes
    pale = [artist for artist in axes.lines if artist.get_gid() == "published:attention"]
    assert [artist.get_alpha() for artist in pale] == [figure.PALE]
    assert by_gid(axes, "published:attention") == [(4096, 0.9)]
    assert by_gid(axes, "family:mine") == [(2048, 0.5)]
    assert by_gid(axes, "published:mine") == by_gid(axes, "family:attention") == []
    footer = [text.get_text() for text in drawn.texts if text.get_gid() == "footer"]
    assert any("published with Holdall: NVIDIA H200, commit abcdef" in line for line in footer)
    text = table.render(sweeps)
    assert "| attention † |" in text
    assert "†: published with Holdall, not trained here: NVIDIA H200, commit abcdef." in text
    assert "mine †" not in text
    assert "published with Holdall, NVIDIA H200, commit abcdef" in page.render(sweeps)


def test_without_marks_nothing_is_said(tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "results.jsonl").write_text(json.dumps(line("mine", 2048, 0.5, laws=7, published="x")) + "\n")
    sweeps = load([tmp_path])
    assert not sweeps[0].notes
    assert "†" not in table.render(sweeps)
    assert "✗" not in table.render(sweeps)
    (footer,) = (text.get_text() for text in figure.draw(sweeps).texts if text.get_gid() == "footer")
    assert footer == "1 seed: no spread known; --seeds 3 adds two."


def test_widths_mark_the_same(sweeps: tuple[Sweep, ...], tmp_path: Path) -> None:
    drawn = widths.draw(sweeps)
    assert by_gid(drawn.axes[0], "broken") == [(64, 0.8), (64, 0.99)]
    (pale,) = (artist for artist in drawn.axes[0].lines if artist.get_gid() == "family:attention")
    assert pale.get_alpha() == figure.PALE
    (words,) = (text.get_text() for text in drawn.texts if text.get_gid() == "published")
    assert "NVIDIA H200" in words
