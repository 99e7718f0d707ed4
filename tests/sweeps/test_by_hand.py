"""Models built by hand beside a sweep's: on its own test rows, counted as its models are, not as trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdall import files
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.recipes import quick
from holdall.report import chart, figure, page, table, widths
from holdall.report.data import Sweep, load, pareto
from holdall.sweeps import SweepConfig, by_hand
from holdall.tasks.data import MQARData, MQARSegment, TaskData
from holdall.theory.by_hand import configured, right

DATA = MQARData(
    vocab=32,
    filler="key-free",
    seed=5,
    train=(MQARSegment(length=16, pairs=2, rows=64), MQARSegment(length=24, pairs=4, rows=64)),
    test=(MQARSegment(length=16, pairs=2, rows=30), MQARSegment(length=24, pairs=4, rows=30)),
)


def write_sweep(folder: Path, data: Any = DATA) -> Path:
    """A sweep folder with attention, trained as it says, in it."""
    point = quick.point("attention", "attention", AttentionConfig(width=8), task=data, rates=(0.01, 0.02))
    sweep = SweepConfig(recipe="mine", points=(point,))
    tests = [
        {"vocab": 32, "values": 16, "questions": part.pairs, "difficulty": part.pairs, **part.to_dict()}
        for part in data.test
    ] if isinstance(data, MQARData) else []  # fmt: skip
    about = {"recipe": "mine", "command": "holdall frontier mine.py", "context_len": 24, "task": "recall"}
    folder.mkdir(exist_ok=True)
    files.write_json(
        folder / "config.json",
        {**about, "difficulty": "pairs", "test": tests, "points": sweep.to_dict()["points"]},
    )
    line = {
        "label": "attention", "family": "attention", "mixer": "attention", "width": 8, "state_bytes": 2048,
        "state_elements": 512, "accuracy": 0.5, "accuracy_by_difficulty": {"2": 0.6, "4": 0.4}, "seed": 0,
    }  # fmt: skip
    lines = [{**line, "learning_rate": rate} for rate in (0.01, 0.02)]
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_sweep(tmp_path_factory.mktemp("runs") / "mine")
    by_hand.add(made)
    return made


@pytest.fixture
def sweeps(folder: Path) -> tuple[Sweep, ...]:
    return load([folder])


def test_lines_say_what_the_models_do_on_the_sweep_s_own_rows(folder: Path) -> None:
    lines = {line["label"]: line for line in files.read_lines(folder / by_hand.FILE)}
    assert [label for label in lines if "BaseConv" in label] == [
        "BaseConv by hand, S = 8",
        "BaseConv by hand, S = 16",
    ]
    line = lines["BaseConv by hand, S = 8"]
    model = configured("base-conv:shifts=8", vocab=32, length=24).build(torch.float32)
    scores = [float(right(model, rows).double().mean()) for rows in TaskData(DATA).test]
    assert line["accuracy_by_difficulty"] == dict(zip(("2", "4"), scores, strict=True))
    assert line["accuracy"] == sum(scores) / 2
    assert 0 < line["accuracy"] < 1
    assert line["state_elements"] == model.state_elements(24)
    assert line["state_bytes"] == 4 * line["state_elements"]  # all of them fp32
    assert lines["attention by hand"]["accuracy"] == 1.0
    # a counter of tokens in int64
    assert lines["attention by hand"]["state_bytes"] == 4 * lines["attention by hand"]["state_elements"] + 4
    for each in lines.values():
        assert (each["kind"], each["learning_rate"]) == ("by hand", None)
        assert not {"run", "weights", "steps"} & set(each)
    assert lines["attention by hand"]["family"] == "attention"
    assert lines["linear attention by hand, F = 16"]["family"] == "linear attention"


def test_lines_that_are_there_are_not_computed_again(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    seen: list[str] = []

    def stop(line: dict[str, Any]) -> None:
        seen.append(line["label"])
        if len(seen) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        by_hand.add(tmp_path, finished=stop)
    written = (tmp_path / by_hand.FILE).read_text()
    assert written.count("\n") == 2
    watched: list[str] = []
    by_hand.add(tmp_path, watch=lambda label, done, total: watched.append(label))
    assert (tmp_path / by_hand.FILE).read_text().startswith(written)
    assert watched
    assert not set(watched) & set(seen)


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    refused: dict[str, str] = {}
    large = dataclasses.replace(DATA, vocab=16384)
    labels = [config.label for config in by_hand.configs(large, refused)]
    assert "linear attention by hand, F = 64" in labels
    (why,) = (why for label, why in refused.items() if label == "linear-attention by hand, lines = 0")
    assert "lower vocab" in why


def test_what_would_take_hours_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_hand, "MOST_OPERATIONS", 2e8)
    refused = by_hand.add(write_sweep(tmp_path))
    labels = {line["label"] for line in files.read_lines(tmp_path / by_hand.FILE)}
    assert labels
    assert "BaseConv by hand, S = 16" in refused
    assert not labels & set(refused)
    assert "dense layers of width 330 would take" in refused["BaseConv by hand, S = 16"]


def test_another_task_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path, quick.data("induction-heads", length=(16,), steps=2))
    with pytest.raises(ValueError, match=r"answer MQAR .* not the task single-query"):
        by_hand.add(tmp_path)
    with pytest.raises(RunError, match=r"config\.json"):
        by_hand.add(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ pictures


def test_they_are_no_models_of_the_sweep(sweeps: tuple[Sweep, ...]) -> None:
    (sweep,) = sweeps
    assert [model.label for model in sweep.models] == ["attention"]
    assert all(model.by_hand for model in sweep.by_hand)
    assert not sweep.models[0].by_hand
    assert [model.label for model in pareto(sweep.models)] == ["attention"]
    assert not widths.has_widths(sweeps)
    assert any(
        f"{len(sweep.by_hand)} models are built by hand and not trained" in note for note in sweep.notes
    )


def test_the_figure_has_them_in_marks_of_their_own(sweeps: tuple[Sweep, ...]) -> None:
    drawn = figure.draw(sweeps)
    axes = drawn.axes[0]
    marks = {
        artist.get_gid(): list(zip(*artist.get_data(), strict=True))
        for artist in axes.lines
        if str(artist.get_gid()).startswith("by hand")
    }
    assert {gid for gid in marks} == {f"by hand:{name}" for name in (
        "attention", "linear attention", "taylor", "base conv")}  # fmt: skip
    assert marks["by hand:attention"] == [
        (m.state, m.accuracy) for m in sweeps[0].by_hand if m.family == "attention"
    ]
    (trained,) = (artist for artist in axes.lines if artist.get_gid() == "family:attention")
    assert list(zip(*trained.get_data(), strict=True)) == [(2048, 0.5)]
    (hand,) = (artist for artist in axes.lines if artist.get_gid() == "by hand:attention")
    assert hand.get_marker() == "d" != trained.get_marker()
    assert hand.get_markerfacecolor() == "white"
    (legend,) = drawn.legends
    assert "by hand, not trained" in [text.get_text() for text in legend.texts]
    (step,) = (artist for artist in axes.lines if artist.get_gid() == "pareto")
    assert set(step.get_ydata()) == {0.5}


def test_the_page_and_the_table_say_by_hand(sweeps: tuple[Sweep, ...]) -> None:
    marks = chart.Marks()
    traces = [trace for trace in chart.traces(sweeps, marks) if trace.get("meta") == "by hand"]
    assert {trace["marker"]["symbol"] for trace in traces} == {"diamond-tall-open"}
    assert sum(len(trace["x"]) for trace in traces) == len(sweeps[0].by_hand)
    # the trained model's family is in the legend once; the others have only these
    assert [trace["showlegend"] for trace in traces] == [False, True, True, True]
    text = table.render(sweeps)
    (line,) = (line for line in text.splitlines() if line.startswith("| attention by hand |"))
    assert "| by hand |" in line
    assert "by hand: weights set as a theorem says, not trained" in text
    html = page.render(sweeps)
    assert html.count('data-value="by hand"') == 0
    assert html.count(">by hand</td>") == len(sweeps[0].by_hand)


@pytest.mark.browser
def test_the_page_draws_them(folder: Path, tmp_path: Path, browser: Any) -> None:
    path = tmp_path / "frontier.html"
    page.save(load([folder]), path)
    opened = browser.new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.goto(path.as_uri())
    opened.wait_for_selector(".legend .traces")
    legend = opened.locator(".legendtext").all_text_contents()
    assert "by hand, not trained" in legend
    assert legend.count("attention") == 1
    opened.get_by_role("button", name="attention by hand", exact=True).click()
    assert "kind" in opened.locator("#card dt").all_text_contents()
    opened.close()
    assert troubles == []
