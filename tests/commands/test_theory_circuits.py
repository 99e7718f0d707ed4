"""`holdall theory primitives`, `circuit` and `sort`, from the command line to what they print."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdall import cli
from holdall.commands import theory_circuits
from holdall.theory.compile import Compiled

Run = Callable[..., tuple[int, str, str]]

FILE = """
def cubic(x):
    return (x[0] + x[1]) * x[2] ** 2 - 3, x[0] * x[1]

def once(x):
    return (x[0] + x[1]) * (x[2] - 3) * (x[3] + 1)

def channels(x):
    return sum(a * b for a, b in x)

def branches(x):
    return x[0] if x[1] > 2 else x[2]

def deep(x):
    return x[0] ** 40

def beyond(x):
    return x[0] * x[99]
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """A command beside a file my.py: its exit status, what it wrote to stdout in one line, and to stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(theory_circuits.console, "_width", 140)
    (tmp_path / "my.py").write_text(FILE)

    def ran(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["holdall", "theory", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(out.split()), err

    return ran


def test_a_function_is_compiled_and_compared(run: Run) -> None:
    code, out, _ = run("circuit", "my.py:cubic", "--inputs", 3, "--low", -5, "--rows", 30, "--out", "c.png")
    assert code == 0
    assert "g0 = (x[0]) (x[1])" in out or "g0 = (x[2]) (x[2])" in out
    assert "products 3 of 3 x 1 inputs from -5 to 8" in out
    assert "layers 7 promised: 2 depth + 3 = 2 x 2 + 3 = 7" in out
    assert re.search(r"width (\d+) promised: 1 of the input \+ \d+ registers", out)
    assert "largest error 0 of 30 random rows" in out
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_read_once_is_a_formula(run: Run) -> None:
    assert "layers 4 promised: depth + 2 = 2 + 2 = 4" in run("circuit", "my.py:once", "--inputs", 4)[1]
    circuit = run("circuit", "my.py:once", "--inputs", 4, "--compiler", "circuit", "--show", 1)[1]
    assert "2 x 2 + 3 = 7" in circuit
    assert "... 1 more (--show)" in circuit
    code, _, err = run("circuit", "my.py:cubic", "--inputs", 3, "--compiler", "formula")
    assert code == 2
    assert "x[0] is read 2 times; a formula reads every wire once" in err


def test_tokens_have_channels(run: Run) -> None:
    code, out, _ = run("circuit", "my.py:channels", "--inputs", 5, "--channels", 2)
    assert code == 0
    assert "products 5 of 5 x 2 inputs from -8 to 8" in out


def test_an_error_is_an_exit_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "error", lambda *_: 3)
    code, out, _ = run("circuit", "my.py:once", "--inputs", 4)
    assert code == 1
    assert "largest error 3" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("circuit my.py --inputs 3", "'my.py' names no function: write it as my.py:f"),
        ("circuit no.py:f --inputs 3", "no file at no.py"),
        ("circuit my.py:cubi --inputs 3", "my.py has no function 'cubi'. Did you mean 'cubic'?"),
        ("circuit my.py:branches --inputs 3", "my.py, line 12: TypeError: a circuit computes the same gates"),
        ("circuit my.py:beyond --inputs 3", "my.py, line 18: IndexError"),
        ("circuit my.py:deep --inputs 1", "could reach 1.15e+18, beyond 2^53"),
        ("circuit my.py:once --inputs 0", "--inputs = 0 must be positive"),
        ("circuit my.py:once --inputs 4 --low 9", "inputs from 9 to 8: give two integers, low <= high"),
        ("sort --pairs 0", "--pairs = (0,) must be positive"),
    ],
)
def test_what_a_user_can_mend_is_said(run: Run, words: str, says: str) -> None:
    code, _, err = run(*words.split())
    assert code == 2
    assert err.startswith("error ")
    assert says in err


def test_sorting_beside_all_pairs(run: Run) -> None:
    code, out, _ = run("sort", "--pairs", 2, 4, "--rows", 20)
    assert code == 0
    assert "2 all pairs 20 3 9 22 213 0, 0" in out
    assert re.search(r"4 by sorting 593 48 99 115 [\d,]+ 0, 0", out)
    code, out, _ = run("sort", "--pairs", 2, "--rows", 20, "--no-run")
    assert "2 by sorting 91 19 0 " in out


def test_a_wrong_row_is_an_exit_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory_circuits, "wrong_rows", lambda *_: 1)
    assert run("sort", "--pairs", 2, "--rows", 5, "--no-run")[0] == 1


def test_the_primitives_are_drawn(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("primitives", "--out", tmp_path / "new" / "p.png")
    assert code == 0
    assert "filtered_product y[t] = x[t - 1] z[t] + x[t] 2 2" in out
    image = (tmp_path / "new" / "p.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert b"holdall theory primitives" in image  # the command that made it
