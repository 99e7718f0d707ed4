"""docs/text.md is true: its commands run on files such as it names, and so does its code."""

import gzip
import json
import lzma
import re
import shlex
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from holdall import cli
from holdall.text import open_corpus, tokenizer, write_corpus

PAGE = (Path(__file__).parents[2] / "docs" / "text.md").read_text()
DATA = PAGE.partition("## Data")[2].partition("\n## ")[0]
BLOCKS = [block.partition("\n") for block in DATA.split("```")[1::2]]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names."""
    zstandard = pytest.importorskip("zstandard", reason="the extra text is not installed")
    lines = "\n".join(json.dumps({"text": f"text {i}", "body": f"body {i}"}) for i in range(400)).encode()
    (tmp_path / "articles.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "books").mkdir()
    for i in range(60):
        (tmp_path / "books" / f"{i}.txt.gz").write_bytes(gzip.compress(f"book {i}".encode()))
    (tmp_path / "notes.txt").write_text("notes")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(f"story {i}" for i in range(400)))
    made = Tokenizer(models.WordLevel({"?": 0, "text": 1}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "gpt2-tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_its_commands_run(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for _, _, code in BLOCKS[:1] for line in code.splitlines()]
    assert len(commands) == 5
    for command in commands:
        monkeypatch.setattr(
            sys, "argv", [*shlex.split(command), *([] if "--check" in command else ["--workers=1"])]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, command
    documents = {
        path.name: open_corpus(path).manifest["train"]["documents"] for path in (there / "data").iterdir()
    }
    assert documents["given"] == 400
    assert 380 < documents["stories"] < 400
    assert 380 < documents["articles"] < 400
    assert 50 < documents["books"] < 61


@pytest.mark.usefixtures("there")
def test_its_code_runs() -> None:
    (code,) = [code for language, _, code in BLOCKS if language == "python"]
    exec(compile(code, "docs/text.md", "exec"), {})


@pytest.mark.usefixtures("there")
def test_the_folder_holds_what_the_table_says() -> None:
    write_corpus([Path("books")], Path("a"), tokenizer("gpt2-tokenizer.json"), valid=0.5)
    there = {path.name.replace("valid-", "train-") for path in Path("a").glob("[!.]*")}
    table = DATA[DATA.index("| file |") :]
    assert {name for name in re.findall(r"`([^`]+)`", table) if "valid-" not in name} == there
