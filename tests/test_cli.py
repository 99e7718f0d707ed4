"""The command line as a whole; what each command does is tested beside it."""

from __future__ import annotations

import dataclasses
import operator
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from holdall import cli, flags, settings
from holdall.commands import train as shown
from holdall.commands import zoo
from holdall.commands.loading import Loading
from holdall.settings import Range
from holdall.training.options import PretrainOptions

pytestmark = pytest.mark.quick

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command: its exit status and what it wrote to stderr."""

    def ran(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["holdall", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return ran


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "holdall.cli", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("report", "name at least one folder"),
        ("recall", "name at least one run"),
        ("zoo --width -3", "--width = -3 must be positive"),
        ("zoo --context 0", "--context = 0 must be positive"),
        ("soundness --length -1", "--length = -1 must be positive"),
        ("soundness retnet --out FILE/x", "cannot write FILE/x: Not a directory"),
        ("soundness retnet:heads=0", "RetNetConfig.heads = 0 must be positive"),
        ("matrix --length 3", "--length = 3 must be at least 4"),
        ("matrix --heads 5", "--heads = 5 must be from 1 to 4"),
        ("matrix --scale nan", "--scale = nan must be at least 0 and finite"),
        ("recall x --rows 0", "--rows = 0 must be positive"),
        ("frontier --workers 0", "--workers = 0 must be positive"),
        ("frontier --minutes -5", "--minutes = -5.0 must be at least 0 and finite"),
        ("frontier --minutes nan", "--minutes = nan must be at least 0 and finite"),
        ("frontier quik", "Did you mean 'quick'"),
        ("frontier --depth 0", "--depth = 0 must be positive"),
        ("frontier --rates nan", "--rates = (nan,) must be positive and finite"),
        ("frontier zoo --pairs 4", "the recipe zoo has no --pairs; it has --seeds"),
        ("frontier nothing.py", "no file at nothing.py"),
        ("frontier --add mambo", "Did you mean 'mamba'"),
        ("recipe new ---", "'---' makes no file name"),
        ("laws", "name a mixer, or the file of your own"),
        ("laws mambo", "Did you mean 'mamba'"),
        ("train --learning-rate inf", "--learning-rate = inf must be positive and finite"),
        ("train --context-len 0", "--context = 0 must be positive"),
        ("train --betas 0.9 1", "--betas = (0.9, 1.0) must be at least 0 and below 1"),
        ("train --micro-batch 0", "--micro-batch = 0 must be positive"),
        ("train --compile --no-compile", "--compile and --no-compile were both given"),
        ("data x --out y --valid 1.5", "--valid = 1.5 must be at least 0 and below 1"),
        ("data x --out y --workers 0", "--workers = 0 must be positive"),
    ],
)
def test_what_a_user_can_mend_is_one_line(run: Run, words: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    code, said = run(*words.replace("FILE", file).split())
    assert code == 2
    assert said.startswith("error ")
    assert says.replace("FILE", file) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        "frontier",
        "recipe",
        "report",
        "laws",
        "zoo",
        "soundness",
        "matrix",
        "data",
        "train",
        "generate",
        "chat",
        "serve",
        "recall",
        "theory.circuit",
        "theory.sort",
    ],
)
def test_every_number_of_a_command_declares_its_range(name: str) -> None:
    def declares(kind: Any) -> bool:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated and args[0] in (int, float):
            return any(isinstance(each, Range) for each in args)
        return kind not in (int, float) and all(declares(arg) for arg in args if origin is not Literal)

    for owner in (operator.attrgetter(name)(cli), Loading, *([cli.TrainFlags] if name == "train" else [])):
        for option, kind in typing.get_type_hints(owner, include_extras=True).items():
            assert option == "return" or declares(kind), f"{name} --{option} has no range"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("x = 1\ny = x + 'a'\n", 2, "TypeError: unsupported operand"),
        ("def f(:\n    pass\n", 1, "SyntaxError: "),
        ("import holdall\n\nholdall.build('mamba', width=0)\n", 3, "ValueError: MambaConfig.width = 0"),
        ("import no_such_module\n", 1, "No module named 'no_such_module'"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
    ],
)
def test_an_error_in_a_loaded_file_names_its_line(
    run: Run, tmp_path: Path, text: str, line: int, says: str
) -> None:
    (tmp_path / "mine[b].py").write_text(text)
    code, said = run("zoo", "--load", tmp_path / "mine[b].py")
    assert code == 2
    assert f"{tmp_path / 'mine[b].py'}, line {line}: " in said
    assert says in said
    assert text.splitlines()[line - 1].strip() in said
    assert said.count("\n") == 2


def test_a_traceback_is_shown_on_demand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDALL_TRACEBACK", "1")
    code, said = run("report")
    assert code == 2
    assert said.startswith("Traceback")
    assert said.splitlines()[-1] == "error name at least one folder: holdall report FOLDER [FOLDER ...]"


@pytest.mark.parametrize("error", ["{}['x']", "1 + ''", "int('a')", "None.x", "1 / 0", "[].remove(3)"])
def test_a_fault_of_holdall_keeps_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """Also one whose type a refusal may have."""
    monkeypatch.setattr(zoo, "zoo", lambda *_: eval(error))
    code, said = run("zoo", "--width", 7)
    assert code == 1
    assert said.startswith("Traceback")
    last = said.splitlines()[-1]
    assert re.match(r"This is a bug in Holdall.*report.*\(holdall zoo --width 7\).*torch \d", last)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "a[/b]/c"), "a[/b]/c: Permission denied"),
        (MemoryError(), "too little memory: choose smaller sizes"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "too little",
        ),
    ],
)
def test_the_machine_s_errors_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(zoo, "zoo", fail)
    code, said = run("zoo")
    assert (code, said.count("\n")) == (2, 1)
    assert says in said


@pytest.mark.parametrize(
    ("words", "wanted"), [((), None), (("--compile",), True), (("--no-compile",), False)]
)
def test_compiling_is_a_flag(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], wanted: bool | None
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(shown, "train", lambda *args: given.extend(args) or 0)
    assert run("train", *words, "based-mini")[0] == 0
    assert given[0] == "based-mini"
    assert [each.get("compile") for each in given if isinstance(each, dict)] == [None, wanted]


def test_every_training_option_is_a_flag_with_its_own_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["holdall", "train", "--help"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main()
    help = " ".join(capsys.readouterr().out.replace("│", " ").split())
    docs = flags.field_docs(PretrainOptions)
    for field in dataclasses.fields(PretrainOptions):
        assert docs[field.name] in help or field.name == "data_hash"
        assert f"--{field.name.replace('_', '-')} " in help or field.name == "data_hash"


@pytest.mark.parametrize("name", ["generate", "chat", "serve", "train", "frontier", "recall", "zoo"])
def test_help_shows_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """None is no value of a flag, but what it is without; and all commands that run a model load it alike."""
    monkeypatch.setattr(sys, "argv", ["holdall", name, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    help = capsys.readouterr().out
    assert "None}" not in help
    assert "{None" not in help
    if name in ("generate", "chat", "serve"):
        assert "--checkpoint {model,best,last} " in help
        for field, doc in flags.field_docs(Loading).items():
            assert f"--{field} " in help
            assert doc.split(".")[0] in " ".join(help.replace("│", " ").split())


def test_a_new_field_is_a_flag_of_its_own() -> None:
    """With its range, its docstring and, of a boolean, its opposite; nothing else names it."""
    made = flags.flags_of(Options, called={"some_rate": "rate"}, leave_out=("hidden",))
    assert flags.given(made()) == {}
    typed = tyro.cli(made, args=["--some-rate", "3", "--no-fast", "--pair", "0.5", "0.75"])
    assert flags.given(typed) == {"some_rate": 3.0, "fast": False, "pair": (0.5, 0.75)}
    assert flags.given(tyro.cli(made, args=["--rate", "2", "--kind", "b"])) == {"some_rate": 2.0, "kind": "b"}
    with pytest.raises(ValueError, match="--fast and --no-fast were both given"):
        flags.given(tyro.cli(made, args=["--fast", "--no-fast"]))
    assert flags.field_docs(Options) == {
        "some_rate": "How fast, over two lines.", "fast": "Whether.", "pair": "Two.", "kind": "One of two.",
        "hidden": "Not a flag.",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"--rate = -1.0 must be positive and finite"):
        flags.check(made, {"rate": -1.0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of every kind that a field of the training options has."""

    some_rate: settings.PositiveFloat = 1.0
    """How fast,
    over two lines."""
    fast: bool = True
    """Whether."""
    pair: settings.Betas = (0.1, 0.2)
    """Two."""
    kind: Literal["a", "b"] = "a"
    """One of two."""
    hidden: int = 0
    """Not a flag."""


def test_help_needs_no_pytorch() -> None:
    script = (
        "import sys; from holdall import cli; sys.argv = ['holdall', 'train', '--help']\n"
        "try: cli.main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
