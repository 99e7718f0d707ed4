"""`holdall theory list`, `mqar`, `frontier` and `page`, and `holdall frontier --by-hand`."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import children
import pytest

from holdall import cli, commands, files, processes

RECIPE = """
from holdall.mixers.attention import AttentionConfig
from holdall.recipes import quick
from holdall.sweeps import SweepConfig
from holdall.tasks.data import MQARData, MQARSegment


def sweeps(task: str = "mqar"):
    if task != "mqar":
        data = quick.data(task, length=(16,), steps=2)
    else:
        segment = MQARSegment(length=16, pairs=2, rows=64)
        data = MQARData(vocab=32, filler="key-free", train=(segment,), test=(segment,))
    point = quick.point("attention", "attention", AttentionConfig(width=8), task=data, rates=(0.01,))
    return SweepConfig(recipe="mine", points=(point,))
"""


@pytest.fixture
def holdall(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """The command line in an empty folder: what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "context", children.context)
    monkeypatch.setattr(commands.console, "width", 100)

    def call(words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["holdall", *words.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.out + said.err
        return said.out + said.err

    return call


def test_the_list_says_what_each_claims_and_costs(holdall: Callable[..., str]) -> None:
    out = re.sub(r"\s+", " ", holdall("theory list --vocab 32 --length 24"))
    for name in ("attention", "linear-attention", "taylor", "base-conv", "base-conv-two-layers"):
        assert f" {name} " in f" {out}"
    assert "2 layers of width 10, 251 elements of state, 245 used" in out
    assert "6 layers of width 470" in out
    assert "shifts = 0: S, the distances that are looked at" in out
    assert "digits = 0: p, the digits of a code" in out
    assert "sizes" not in out


def test_mqar_prints_accuracy_size_and_what_was_promised(holdall: Callable[..., str]) -> None:
    out = holdall(
        "theory mqar attention base-conv:shifts=5 taylor --vocab 32 --length 24 --pairs 4 --rows 16"
    )
    (attention,) = re.findall(r"^ +attention .*$", out, flags=re.M)
    assert attention.split()[1:3] == ["2", "10"]
    assert attention.split()[-1] == "100.00%"
    (said,) = re.findall(r"^base-conv:shifts=5: (.*)$", out, flags=re.M)
    (shown,) = re.findall(r"^ +base-conv:shifts=5 .*?([\d.]+%)\s*$", out, flags=re.M)
    assert said == f"64 of 64 questions as the theorem says, which promises {shown}"
    assert "K_max = f^2 dv / (6 ln V) = 788 pairs" in out
    out = holdall("theory mqar --vocab 64 --length 48 --pairs 4 --rows 2 --precision fp32")
    assert "base-conv-two-layers: not built: 47 distances need width 6080" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("theory mqar atention", "unknown construction 'atention'. Did you mean 'attention'"),
        ("theory mqar --pairs 30", "30 pairs do not fit into length 64"),
        ("theory mqar --rows 0", "--rows = 0 must be positive"),
        ("theory frontier nothing", "nothing is no sweep folder; name one made by holdall frontier"),
    ],
)
def test_what_a_user_can_mend_is_one_line(holdall: Callable[..., str], words: str, says: str) -> None:
    out = holdall(words, code=2)
    assert out.startswith("error ")
    assert says in out


def test_a_sweep_shows_them_beside_its_own(holdall: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    out = holdall("frontier mine.py --device cpu --workers 1 --by-hand")
    assert "recall by hand, not trained" in out
    assert re.search(r"attention by hand +10 .* 100.0%", out)
    assert len(files.read_lines(Path("runs/mine/results.jsonl"))) == 1
    text = Path("runs/mine/table.md").read_text()
    assert "| attention by hand |" in text
    before = Path("runs/mine/by_hand.jsonl").read_text()
    assert "attention by hand" in holdall("theory frontier runs/mine")
    assert Path("runs/mine/by_hand.jsonl").read_text() == before
    out = holdall("frontier mine.py --task induction-heads --device cpu --by-hand --out runs/other", code=2)
    assert "models built by hand answer MQAR" in out
    assert not Path("runs/other").exists()


def test_the_page_is_written(holdall: Callable[..., str], tmp_path: Path) -> None:
    holdall("theory page --out pages/theory.html")
    assert "<title>Recall by hand</title>" in (tmp_path / "pages" / "theory.html").read_text(encoding="utf-8")
