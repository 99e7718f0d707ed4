"""`holdall data` as its user meets it."""

import json
import os
import sys
from pathlib import Path

import pytest

from holdall import cli


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """The exit status and everything that was printed."""
    monkeypatch.setattr(sys, "argv", ["holdall", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [json.dumps({"body": f"text number {i}"}) for i in range(300)]
    path = tmp_path / "[texts].jsonl"  # a name that rich would take for its own markup
    path.write_text("\n".join([*lines, "torn"]))
    return path


def test_it_makes_tells_checks_and_does_nothing_twice(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("data", source, "--out", out, "--text-field", "body", "--workers", 1, "--valid", 0.1)
    code, told = run(monkeypatch, capsys, *command)
    assert code == 0, told
    assert "left out: 1 of broken JSON" in told
    assert "[texts].jsonl:301: broken JSON" in told.replace("\n", "")
    assert "tokenizer bytes, vocabulary 257" in told
    assert "tokens/s" in told
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == " ".join(["holdall", *map(str, command)])
    code, told = run(monkeypatch, capsys, *command)
    assert code == 0
    assert "nothing was done" in told
    code, told = run(monkeypatch, capsys, "data", "--check", "--out", out)
    assert code == 0
    assert f"All {len(manifest['files'])} files match the hashes in the manifest" in told
    shard = out / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    code, told = run(monkeypatch, capsys, "data", "--check", "--out", out)
    assert code == 2
    assert "train-00000.npy was altered" in told
    assert f"make it again: {manifest['command']}" in told


def test_what_comes_from_files_is_neither_markup_nor_a_terminal_s_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    books = tmp_path / "a[" / "b]"
    books.mkdir(parents=True)
    name = os.fsdecode(b"[red]caf\xe9\x1b[31m\n[].txt")
    (books / name).write_bytes(b"one\xff")
    (books / "b[x].txt").write_bytes(b"two")
    out = books / "out[" / "]\x1b[31m"
    make = ("data", books, "--valid", 0, "--separator", "|")
    for command in (make, make, ("data", "--check")):
        code, told = run(monkeypatch, capsys, *command, "--out", out)
        assert code == 0, told
        assert not set(told) - {"\n"} - {letter for letter in told if letter.isprintable()}
        assert "[red]caf\\xe9\\x1b[31m\\n[].txt:1: bad UTF-8, byte 4" in told
        assert "the separator does not occur in 2 files" in told
        assert "b[x].txt" in told
        assert "out[/]\\x1b[31m" in told
    (out / "manifest.json").unlink()
    (out / "manifest.json").mkdir()
    code, told = run(monkeypatch, capsys, "data", "--check", "--out", out)
    assert (code, told.count("\n")) == (2, 1)
    assert "\x1b" not in told


def test_a_validation_file_and_a_separator_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("one\n---\ntwo\n---\nthree")
    (tmp_path / "valid.txt").write_text("four")
    out = tmp_path / "out"
    files = (tmp_path / "train.txt", "--valid", tmp_path / "valid.txt")
    code, told = run(monkeypatch, capsys, "data", *files, "--out", out, "--separator", "\\n---\\n")
    assert code == 0, told
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["train"]["documents"], manifest["valid"]["documents"]) == (3, 1)
    assert (manifest["train"]["tokens"], manifest["valid"]["tokens"]) == (3 + 3 + 5 + 3, 4 + 1)


def test_what_a_user_can_mend_is_one_line_and_exit_status_2(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ((), "name at least one file or folder"),
        ((tmp_path / "nowhere",), "nowhere is neither a file nor a folder"),
        ((source,), "no 'text' among the fields body. Name the right one with --text-field"),
        ((source, "--text-field", "body", "--strict"), "[texts].jsonl:301: broken JSON"),
        ((source, "--tokenizer", "gtp2"), "no tokenizer 'gtp2' and no such file"),
        ((source, "--workers", "0"), "workers"),
        (("--check",), "is not finished: run its `holdall data` command again"),
    ):
        code, told = run(monkeypatch, capsys, "data", *arguments, "--out", out)
        assert (code, told.startswith("error "), told.count("\n")) == (2, True, 1), told
        assert message in told


def test_stopped_by_its_user_it_says_how_to_go_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdall.text.write_corpus", stop)
    code, told = run(monkeypatch, capsys, "data", source, "--out", tmp_path / "out")
    assert code == 130
    assert "the same command resumes" in told
