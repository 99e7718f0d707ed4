"""What comes from files and users is printed as it is: no markup, no control of the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table
from rich.text import Text

from holdall import commands
from holdall.commands import PlainConsole, Words, printable, zoo

ODD = ["a[/b]", "m[red]x", "[bold]y[/]", ":smile:", "tab\there"]
STEERING = ["\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "over\rwritten", "bell\x07", "b\x08ack", "\x00"]


def printed(*things: object, **options: object) -> str:
    file = io.StringIO()
    PlainConsole(file=file, width=120, force_terminal=True, color_system=None).print(*things, **options)
    return file.getvalue()


def table(text: str) -> Table:
    made = Table(text, title=text, caption=text)
    made.add_row(text)
    made.add_row(Text(text, "bold"))
    return made


@pytest.mark.parametrize("text", ODD)
def test_brackets_are_no_markup(text: str) -> None:
    text = text.expandtabs()
    assert printed(text) == printed(Text(text)) == f"{text}\n"
    assert printed(table(text)).count(text) == 5
    assert printed(Words("{task.description}").render(SimpleNamespace(description=text))) == f"{text}\n"


@pytest.mark.parametrize("text", STEERING)
def test_nothing_steers_the_terminal(text: str) -> None:
    for shown in (printed(text), printed(Text(text)), printed(table(text)), printed(text, soft_wrap=True)):
        assert not any(
            mark in shown.replace("\x1b[1m", "").replace("\x1b[0m", "") for mark in text if mark < " "
        )
        assert "\x9b" not in shown
        assert printable(text) in shown or not printable(text)


def test_bytes_that_are_no_text_are_marked() -> None:
    assert printed("a\udcffb") == "a\\xffb\n"


def test_what_is_being_done_is_no_markup_either(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(commands, "console", PlainConsole(file=file, width=120, force_terminal=True))
    with commands.busy("reading a[/b]") as say:
        say("reading m[red]x")
    assert "reading m[red]x" in file.getvalue()


def test_an_odd_folder_is_reported_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a[" / "m[red]x"
    assert zoo.soundness(["retnet"], out, 16, 8, ()) == 0
    assert str(out / "soundness.jsonl") in capsys.readouterr().out
