"""The table that a sweep ends with, on terminals of any width."""

from typing import Any

import pytest
from rich.console import Console

from holdall.commands import sweeps

PAIRS = (4, 8, 16, 32, 64, 128, 256)


def line(**changed: Any) -> dict[str, Any]:
    """A line of results.jsonl."""
    return {
        "label": "Taylor, f = 16", "mixer": "taylor", "width": 64, "state_bytes": 40_000, "accuracy": 1.0,
        "accuracy_by_difficulty": {str(k): 1.0 for k in PAIRS}, "learning_rate": 0.00316, "seed": 0,
        "seconds": 100.0, **changed,
    }  # fmt: skip


def printed(monkeypatch: pytest.MonkeyPatch, width: int, lines: list[dict[str, Any]]) -> str:
    console = Console(width=width, record=True)
    monkeypatch.setattr(sweeps, "console", console)
    view = object.__new__(sweeps._FrontierView)
    view.lines = lines
    view.print_table()
    return console.export_text()


@pytest.mark.parametrize(("width", "first"), [(80, 128), (120, 8), (140, 4)])
def test_no_cell_is_cut_off(monkeypatch: pytest.MonkeyPatch, width: int, first: int) -> None:
    lines = [line(width=size, state_bytes=10**4 * size) for size in (64, 128)]
    text = printed(monkeypatch, width, lines)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    (heads,) = [line for line in text.splitlines() if "state" in line]
    assert [k for k in PAIRS if str(k) in heads.split()] == [k for k in PAIRS if k >= first]
    assert ("table.md" in text) == (first > PAIRS[0])


def test_seeds_count_with_their_best_learning_rates_and_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [(0, 0.001, 0.5, 10), (0, 0.01, 0.75, 20), (1, 0.001, 0.25, 60), (1, 0.01, None, 90)]
    lines = [
        line(
            seed=seed,
            learning_rate=rate,
            accuracy=score,
            accuracy_by_difficulty={"4": score},
            seconds=seconds,
        )
        for seed, rate, score, seconds in tried
    ]
    lines.append(line(label="lost", accuracy=None, state_bytes=100))
    title, _, heads, _, lost, mean, *_ = printed(monkeypatch, 100, lines).splitlines()
    assert title.strip() == "recall by pairs at the best learning rate, mean over seeds"
    assert heads.split() == ["model", "state", "recall", "4", "lr", "s"]
    assert lost.split() == ["lost", "100", "B", "-", "-", "-", "-"]
    assert mean.split()[-5:] == ["50.0%", "50.0%", "0.01,", "0.001", "40"]
