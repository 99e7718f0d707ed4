"""Reading sweep folders: what counts as a model's accuracy, the frontier, and files as they really are."""

import json
import math
import re
from pathlib import Path

import pytest

from holdall.files import RunError
from holdall.report import write
from holdall.report.data import families, load, pareto


@pytest.mark.parametrize(
    ("folder", "task"), [("quick", "multi-query"), ("synthetics/induction-heads", "induction")]
)
def test_folders_of_before_say_their_task_too(folder, task):
    (sweep,) = load([Path(__file__).parents[2] / "results" / folder])
    assert sweep.task.startswith(task)
    assert sweep.difficulty == "pairs"  # as their lines were written


def test_best_learning_rate_counts_for_each_seed_and_seeds_make_a_spread(make_sweep, line):
    accuracy = {
        (0, 0.001): 0.5,
        (0, 0.01): 0.9,
        (1, 0.001): 0.7,
        (1, 0.01): 0.2,
        (2, 0.001): None,
        (2, 0.01): 0.8,
    }
    runs = [line("a", 1024, acc, seed=seed, learning_rate=lr) for (seed, lr), acc in accuracy.items()]
    (model,) = load([make_sweep("s", runs)])[0].models
    assert [(run.seed, run.learning_rate) for run in model.best] == [(0, 0.01), (1, 0.001), (2, 0.01)]
    assert (model.low, model.high) == (0.7, 0.9)
    assert model.accuracy == pytest.approx(0.8)
    assert len(model.runs) == 6


def test_models_are_told_apart_by_label_width_and_state(make_sweep, line):
    runs = [
        line("a", 1024, 0.5),
        line("a", 1024, 0.6, learning_rate=0.01),
        line("a", 2048, 0.7, width=128),
        line("a", 4096, 0.8, run="the same label and width, another state"),
        line("b", 1024, 0.9),
    ]
    models = load([make_sweep("s", runs)])[0].models
    assert [(m.label, m.width, m.state_bytes, m.accuracy) for m in models] == [
        ("a", 64, 1024, 0.6),
        ("a", 128, 2048, 0.7),
        ("a", 64, 4096, 0.8),
        ("b", 64, 1024, 0.9),
    ]


def test_pareto_keeps_what_nothing_as_small_beats(make_sweep, line):
    points = {
        "smallest": (100, 0.2),
        "worse at the same size": (100, 0.1),
        "no better though larger": (200, 0.2),
        "worse though larger": (300, 0.15),
        "better": (400, 0.6),
        "best": (800, 0.9),
        "equals the best, larger": (900, 0.9),
        "diverged": (1000, None),
        "no state": (0, 0.95),
    }
    models = load([make_sweep("s", [line(name, *point) for name, point in points.items()])])[0].models
    assert [m.label for m in pareto(models)] == ["smallest", "better", "best"]
    assert [m.label for m in pareto(reversed(models))] == ["smallest", "better", "best"]
    assert pareto([]) == []


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_diverged_runs_are_kept_named_and_never_drawn(make_sweep, line, bad):
    runs = [line("a", 64, 0.5), line("a", 64, bad, learning_rate=1), line("b", 64, bad), line("c", 0, 0.2)]
    (sweep,) = load([make_sweep("s", runs)])
    a, b, c = sweep.models
    assert (a.accuracy, a.drawn, [run.diverged for run in a.runs]) == (0.5, True, [False, True])
    assert math.isnan(b.accuracy)
    assert math.isnan(b.low)
    assert (b.drawn, c.drawn) == (False, False)
    assert sweep.notes == (
        "b (width 64) diverged at every learning rate.",
        "c (width 64) has no state: a log axis has no place for it.",
    )


@pytest.mark.parametrize("tail", ['{"label": "Tay', '{"label": "x", "wi\n', '{"label": "caf\udcc3'])
def test_a_torn_last_line_is_skipped_and_said(make_sweep, line, tail):
    folder = make_sweep("s", [line("a", 64, 0.5)])
    with (folder / "results.jsonl").open("ab") as file:
        file.write(tail.encode("utf-8", "surrogateescape"))
    (sweep,) = load([folder])
    assert [m.label for m in sweep.models] == ["a"]
    assert len(sweep.notes) == 1
    assert re.search(r"line 2 of .*results\.jsonl.*torn", sweep.notes[0])


def test_a_run_written_again_counts_once(make_sweep, line):
    runs = [line("a", 64, 0.9), line("b", 64, 0.1), line("a", 64, 0.5)]
    models = load([make_sweep("s", runs)])[0].models
    assert [(m.label, m.accuracy, len(m.runs)) for m in models] == [("a", 0.5, 1), ("b", 0.1, 1)]


def test_members_of_a_population_share_a_run_folder_and_all_count(make_sweep, line):
    runs = [line("a", 64, 0.5 + rate, run="runs/a", learning_rate=rate) for rate in (0.1, 0.3, 0.2)]
    (model,) = load([make_sweep("s", runs)])[0].models
    assert (model.accuracy, len(model.runs)) == (0.8, 3)


def test_optional_keys_may_be_missing(make_sweep):
    needed = ("label", "mixer", "width", "state_bytes", "accuracy", "learning_rate", "seed")
    values = ("a", "mamba", 64, 512, 0.5, 0.01, 3)
    folder = make_sweep("s", [dict(zip(needed, values, strict=True))])
    (folder / "environment.json").unlink()
    (sweep,) = load([folder])
    assert families([sweep]) == ["mamba"]
    assert sweep.environment == {}
    assert sweep.models[0].best[0].by_difficulty == {}


def test_sweeps_get_the_shortest_names_that_differ(make_sweep, line):
    lines = [line("a", 64, 0.5)]
    one, two = make_sweep("one", lines), make_sweep("two", lines)
    other = make_sweep("other", lines, recipe="based")
    assert [s.name for s in load([one, other])] == ["quick", "based"]
    assert [s.name for s in load([one, two])] == ["one", "two"]
    assert [s.name for s in load([one])] == ["quick"]


def folder_missing(folder):
    (folder / "results.jsonl").unlink()
    (folder / "config.json").unlink()
    (folder / "environment.json").unlink()
    folder.rmdir()


def line_broken(folder):
    good = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(good + '{"label"\n' + good)


def key_missing(folder):
    (folder / "results.jsonl").write_text('{"label": "a", "mixer": "m"}\n')


def config_without_test(folder):
    (folder / "config.json").write_text(json.dumps({"context_len": 64}))


def config_with_empty_test(folder):
    (folder / "config.json").write_text(json.dumps({"context_len": 64, "test": []}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (folder_missing, "no sweep folder {folder}; make one with: holdall frontier"),
        (lambda f: (f / "results.jsonl").unlink(), "{folder} holds no results.jsonl"),
        (lambda f: (f / "config.json").unlink(), "{folder} holds no config.json"),
        (
            lambda f: (f / "results.jsonl").write_text("\n"),
            "{folder}/results.jsonl holds no results yet; wait",
        ),
        (
            lambda f: (f / "results.jsonl").write_text('{"la'),
            "{folder}/results.jsonl holds no results yet; wait",
        ),
        (line_broken, "line 2 of {folder}/results.jsonl is damaged: it is not JSON"),
        (key_missing, "line 1 of {folder}/results.jsonl is damaged: it is no result (KeyError('width'))"),
        (lambda f: (f / "config.json").write_text("{"), "{folder}/config.json is damaged: it is not JSON"),
        (
            lambda f: (f / "config.json").write_text("[]"),
            "{folder}/config.json is damaged: it does not hold a JSON object",
        ),
        (config_without_test, "{folder}/config.json is damaged: it lacks a usable test or context_len"),
        (config_with_empty_test, "{folder}/config.json is damaged: it names no test segment"),
    ],
)
def test_errors_name_the_folder_and_the_way_out(make_sweep, line, harm, says):
    folder = make_sweep("s", [line("a", 64, 0.5)])
    harm(folder)
    with pytest.raises(RunError, match=re.escape(says.format(folder=folder))):
        load([folder])


def test_sweeps_of_different_tests_do_not_share_a_picture(make_sweep, line):
    lines = [line("a", 64, 0.5)]
    other = [{"vocab": 512, "length": 64, "pairs": 8, "rows": 1000}]
    for change in ({"test": other}, {"context_len": 128}):
        with pytest.raises(RunError, match=r"one and .*two took different tests.*one report for each"):
            load([make_sweep("one", lines), make_sweep("two", lines, **change)])


def test_write_makes_each_file_whole_or_not_at_all(sweep, tmp_path, monkeypatch):
    out = tmp_path / "made" / "here"
    names = ["frontier.png", "frontier.html", "table.md"]
    assert write([sweep], out) == [out / name for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    before = (out / "frontier.html").read_bytes()

    def fail(sweeps, path):
        path.write_text("half a page")
        raise OSError("disk full")

    monkeypatch.setattr("holdall.report.page.save", fail)
    with pytest.raises(RunError, match=r"frontier\.html: disk full"):
        write([sweep], out)
    assert (out / "frontier.html").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == sorted(names)


def test_write_refuses_what_cannot_be_told_apart(sweep, tmp_path):
    with pytest.raises(RunError, match="no sweep folder was named"):
        write([], tmp_path)
    with pytest.raises(RunError, match="5 sweeps on one picture"):
        write([sweep] * 5, tmp_path)
