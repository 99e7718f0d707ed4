"""The Markdown table of a sweep: what counts of each model, and nothing that is not there."""

import re

from holdall.report import table
from holdall.report.data import load


def cells(text: str, label: str) -> list[str]:
    """The cells of the model's row, after its label."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:-1]]


def test_a_row_is_a_model_at_its_best_learning_rate(sweep):
    text = table.render(load([sweep]))
    head, rule, *rows = text.split("\n\n")[0].splitlines()
    assert head.startswith("| model | width | state | recall | 4 pairs | 16 | bits recalled |")
    assert rule.count("---:") == head.count("|") - 2
    assert len(rows) == 10
    assert cells(text, "Taylor, f = 16") == [
        "64", "39.3 KiB", "99.0%", "100%", "94%", "76", "0.02%", "0.003", "400", "11",
    ]  # fmt: skip
    assert "after 64 tokens" in text
    assert "mean over seeds" not in text
    assert "Spread: 1 seed: no spread known; --seeds 3 adds two." in text


def test_models_stand_by_family_and_state(sweep):
    labels = [line.split(" | ")[0] for line in table.render(load([sweep])).splitlines()[2:12]]
    assert labels[1:4] == ["| window, w = 4", "| window, w = 8", "| window, w = 16"]
    assert labels[4:6] == ["| Taylor, f = 4", "| Taylor, f = 16"]


def test_several_seeds_are_a_mean_and_its_extremes(make_sweep, line):
    seeds = [(0, 0.003, 0.5), (0, 0.01, 0.6), (1, 0.003, 0.8), (1, 0.01, 0.7)]
    lines = [
        line("a", 64, each, seed=seed, learning_rate=rate, steps=400 + 200 * seed)
        for seed, rate, each in seeds
    ]
    text = table.render(load([make_sweep("s", lines)]))
    found = cells(text, "a")
    assert found[2] == "70.0% (60.0 to 80.0)"
    assert found[3] == "75%"
    assert found[7:9] == ["0.01, 0.003", "500"]
    assert "mean over seeds" in text
    assert (
        "Spread: 2 seeds: each point is their mean, its bar reaches from the lowest to the highest." in text
    )


def test_what_diverged_or_was_not_asked_stays_empty(make_sweep, line):
    lines = [
        line("a", 64, None),
        line("b | c", 64, 0.5, accuracy_by_difficulty={"4": 0.5}),
        line("d", 64, 0.5, seed=0),
        line("d", 64, 0.5, seed=1, accuracy_by_difficulty={"4": 0.5}, recall_bits=None),
        line("e", 64, 0.5),
    ]
    text = table.render(load([make_sweep("s", lines)]))
    assert cells(text, "a")[2:] == ["diverged", *[""] * 7]
    assert cells(text, r"b \| c")[2:5] == ["50.0%", "50%", ""]
    assert cells(text, "d")[3:6] == ["52%", "", ""]
    assert len({len(re.split(r"(?<!\\)\|", row)) for row in text.split("\n\n")[0].splitlines()}) == 1


def test_columns_are_named_by_the_difficulty_of_the_task(make_sweep, line):
    by_length = {"difficulty": "tokens", "accuracy_by_difficulty": {"20": 0.5, "40": 0.25}}
    test = [
        {"vocab": 10, "length": n, "difficulty": n, "rows": 9, "values": 4, "questions": 1} for n in (20, 40)
    ]
    folder = make_sweep("s", [line("a", 64, 0.5, **by_length)], test=test, difficulty="tokens")
    text = table.render(load([folder]))
    assert "| recall | 20 tokens | 40 | bits recalled |" in text
    assert "then by number of tokens" in text
    assert cells(text, "a")[2:5] == ["50.0%", "50%", "25%"]


def test_lines_of_before_are_of_pairs(make_sweep, line):
    old = line("a", 64, 0.5)
    old["accuracy_by_pairs"] = old.pop("accuracy_by_difficulty")
    text = table.render(load([make_sweep("s", [old])]))
    assert "| recall | 4 pairs | 16 | bits recalled |" in text
    assert cells(text, "a")[2:5] == ["50.0%", "55%", "45%"]


def test_several_sweeps_are_told_apart(make_sweep, line):
    folders = [make_sweep(name, [line("a", 64, each)]) for name, each in (("one", 0.5), ("two", 0.75))]
    rows = table.render(load(folders)).splitlines()[2:4]
    assert [row.split(" | ")[:2] for row in rows] == [["| a", "one"], ["| a", "two"]]
