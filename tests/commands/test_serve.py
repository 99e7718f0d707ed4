"""The command `holdall serve`, as typed: it says where it serves, and a signal ends it in good order."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from holdall import cli

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["holdall", "serve", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_it_serves_until_a_signal_and_keeps_the_sessions(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    command = [
        sys.executable, "-m", "holdall.cli", "serve", "--port", "0", "--rows", "3",
        "--sessions", "sessions", "--api-key-file", "key", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        first, second = server.stdout.readline(), server.stdout.readline()
        found = re.search(r"based-mini at (http://127\.0\.0\.1:\d+) ", first)
        assert found, first
        assert second == "3 rows of 117,656 bytes of state, 352,968 bytes in all\n"
        body = json.dumps(
            {"model": "based-mini", "prompt": "It is", "max_tokens": 5, "session": "mine"}
        ).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        asked = urllib.request.Request(f"{found[1]}/v1/completions", body, headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == -signal.SIGTERM
        assert server.stderr.read() == ""
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == ["mine.safetensors"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere",), "there is no folder nowhere"),
        (("--port", 70000), "--port = 70000 must be from 0 to 65,535"),
        (("--host", "192.0.2.1"), "192.0.2.1:0: Cannot assign requested address"),
        (("--api-key-file", "empty"), "empty is empty"),
        (("--api-key-file", "missing"), "missing: No such file"),
        (
            ("--drafts", 4),
            "takes back 0: load it with replay, model.with_replay(9) or holdall serve --replay 9",
        ),
    ],
)
def test_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[Any, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    port = () if "--port" in words else ("--port", 0)
    assert run(monkeypatch, *words, *port) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("holdall.commands.serve.NEEDS", ("fastapi", "no_such_package"))
    assert run(monkeypatch) == 2
    assert "pip install no_such_package" in capsys.readouterr().err
