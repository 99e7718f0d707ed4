"""The table that a sweep ends with, on terminals of any width."""

import pytest
from rich.console import Console

from holdall.show import sweeps

PAIRS = (4, 8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(("width", "first"), [(80, 128), (120, 8), (140, 4)])
def test_no_cell_is_cut_off(monkeypatch: pytest.MonkeyPatch, width: int, first: int) -> None:
    console = Console(width=width, record=True)
    monkeypatch.setattr(sweeps, "console", console)
    view = object.__new__(sweeps._FrontierView)
    view.lines = [
        {
            "label": "Taylor, f = 16", "width": size, "state_bytes": 10**4 * size, "accuracy": 1.0,
            "accuracy_by_pairs": {str(k): 1.0 for k in PAIRS}, "learning_rate": 0.00316, "seconds": 100.0,
        }
        for size in (64, 128)
    ]  # fmt: skip
    view.print_table()
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert [k for k in PAIRS if f"K={k} " in text] == [k for k in PAIRS if k >= first]
    assert ("table.md" in text) == (first > PAIRS[0])
